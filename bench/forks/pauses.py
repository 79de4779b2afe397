"""How long a running VM stands still while it is forked, against how much of its memory is copied meanwhile."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from shares.guests import build

from forks.measure import MIB, table
from forks.platforms import Forks, forks

BASE_MS, SLOPE_MS = 30.0, 1.0
"""What is wanted: at most so much, and so much more for each MiB that is copied."""
AREA_MIB = 192
"""What the guest writes to, page after page."""
SETTLE_S = 3.0


class Point(NamedTuple):
    """One fork: MiB a second that the guest was to write, MiB copied while it stood still, for how many milliseconds."""

    rate: int
    copied: float
    pause: float


def measure(image: str, memory: str, rates: Sequence[int], runs: int) -> dict[str, Any]:
    points: list[Point] = []
    with forks(image) as one, tempfile.TemporaryDirectory() as where:
        one.platform.run("launch", image, "--name", "parent", "--memory", memory, timeout=300)
        one.platform.run("cp", str(build(Path(where))), "parent:/load")
        one.platform.run("exec", "parent", "--", "chmod", "+x", "/load")
        for rate in rates:
            program = f"/load dirty {rate} {AREA_MIB}" if rate else "sleep 1000"
            one.platform.run("exec", "parent", "--", "sh", "-c", f"setsid {program} >/dev/null 2>&1 </dev/null & echo $! >/pid")  # fmt: skip
            time.sleep(SETTLE_S)
            points += [_forked(one, rate) for _ in range(runs)]
            one.platform.run("exec", "parent", "--", "sh", "-c", "kill $(cat /pid)")
    rows = [["written MiB/s", "forks", "copied MiB", "at most", "pause ms", "at most", "over 30 + 1/MiB"]]
    for rate in rates:
        mine = [point for point in points if point.rate == rate]
        copied, pause = [point.copied for point in mine], [point.pause for point in mine]
        row = [f"{statistics.median(copied):.1f}", f"{max(copied):.1f}", f"{statistics.median(pause):.1f}", f"{max(pause):.1f}"]  # fmt: skip
        rows.append([str(rate), str(len(mine)), *row, str(len([point for point in mine if _over(point)]))])
    table(rows)
    slope, base = np.polyfit([point.copied for point in points], [point.pause for point in points], 1)
    print(f"fitted: {base:.1f} ms + {slope:.2f} ms for each MiB; {len(points)} forks, {sum(map(_over, points))} over")
    return {"points": [point._asdict() for point in points], "base_ms": float(base), "slope_ms_mib": float(slope)}


def _over(point: Point) -> bool:
    return point.pause > BASE_MS + SLOPE_MS * point.copied


def _forked(one: Forks, rate: int) -> Point:
    one.platform.run("vm", "fork", "parent", "--name", "child")
    told = one.platform.vm("child")["status"]["details"]["start"]
    kept = json.loads((one.platform.state / "templates" / told["template_id"] / "template.json").read_text())
    one.platform.run("delete", "child", "--force")
    return Point(rate, kept["template"]["copied"] / MIB, told["pause_s"] * 1000)
