"""Draws share over time: what each guest used, and what it was due, under each arm."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shares.measure import SAMPLE_S, Floats

TITLES = {
    "nothing": "no control groups: the kernel's own balance", "weights": "cgroup weights, set once by hand",
    "corral": "Corral",
}  # fmt: skip
SMOOTH = 5


def draw(samples: Path, picture: Path) -> None:
    """``samples``: what :func:`shares.cases.changing` kept. Needs matplotlib: ``pip install -r requirements-bench.lock``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kept = np.load(samples)
    arms = list(dict.fromkeys(key.partition(":")[0] for key in kept.files))
    figure, axes = pyplot.subplots(
        len(arms), 1, sharex=True, sharey=True, figsize=(9, 2.1 * len(arms) + 0.6), squeeze=False
    )
    for axis, arm in zip(axes[:, 0], arms, strict=True):
        used, due = (smoothed(kept[f"{arm}:{what}"]) for what in ("used", "due"))
        seconds = np.arange(len(used)) * SAMPLE_S
        for guest in range(used.shape[1]):
            color = f"C{guest}"
            axis.plot(seconds, used[:, guest], color=color, lw=1.6, label=f"VM {guest + 1}")
            axis.plot(seconds, due[:, guest], color=color, lw=1.0, ls=":", alpha=0.9)
        axis.set_title(TITLES.get(arm, arm), loc="left", fontsize=10)
        axis.set_ylim(0, 1.1)
        axis.set_ylabel("cores")
        axis.grid(alpha=0.25)
    axes[-1, 0].set_xlabel("seconds")
    axes[0, 0].legend(loc="upper right", ncols=4, fontsize=8)
    figure.suptitle(
        "Three guests on two cores; the third wants its CPU half of the time.  Line: used.  Dots: entitled.",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def smoothed(table: Floats) -> Floats:
    """Mean over half a second."""
    kernel = np.ones(SMOOTH) / SMOOTH
    return np.stack([np.convolve(column, kernel, mode="valid") for column in table.T], axis=1)
