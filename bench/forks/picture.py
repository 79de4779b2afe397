"""Draws every start as a dot: how long each arm took to its agent's answer, and until its guest was somebody."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

COLORS = {"answer": "C0", "identity": "C3", "whole": "C2"}
LABELS = {"answer": "the guest's agent answers", "identity": "the guest is somebody of its own", "whole": "the command has ended"}  # fmt: skip
OFFSET = {"answer": -0.16, "identity": 0.16, "whole": 0.0}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def draw(figures: dict[str, Any], picture: Path) -> None:
    """``figures``: what --json wrote. Needs matplotlib: ``pip install -r requirements-bench.lock``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    arms = list(figures["starts"])
    figure, axis = pyplot.subplots(figsize=(9, 0.52 * len(arms) + 1.3))
    spread = random.Random(1)
    seen: list[float] = []
    for row, arm in enumerate(arms):
        for field, color in COLORS.items():
            values = [one[field] for one in figures["starts"][arm] if one[field] is not None]
            if not values:
                continue
            seen += values
            heights = [row + OFFSET[field] + spread.uniform(-0.07, 0.07) for _ in values]
            axis.plot(values, heights, "o", color=color, ms=4, alpha=0.45, mew=0)
            middle = figures["arms"][arm][field]
            axis.plot([middle, middle], [row + OFFSET[field] - 0.15, row + OFFSET[field] + 0.15], color=color, lw=2)
            axis.annotate(f"{middle:.2f} s", (max(values), row + OFFSET[field]), xytext=(7, 0), va="center", fontsize=8,
                          textcoords="offset points", color=color)  # fmt: skip
    for field, color in COLORS.items():
        axis.plot([], [], "o", color=color, ms=4, label=LABELS[field])
    axis.set_xscale("log")
    axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axis.minorticks_off()
    axis.set_xlim(0.75 * min(seen), 2 * max(seen))  # room for the figures
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set_xlabel("seconds from the request (logarithmic)")
    axis.grid(axis="x", alpha=0.25)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(
        f"Starting a guest of image {figures['image']}, {figures['memory']}, software emulation on "
        f"{figures['cores']} cores.  Dots: starts.  Bars: medians.", fontsize=9, loc="left",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
