"""Where the time of a command went, stage by stage; the daemon's own stages are read from the task's steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from corral.cli import failures
from corral.cli.output import Object
from corral.cli.progress import phrase


class Timings:
    """Stages one after the other, from ``start`` (the start of this process) on."""

    def __init__(self, start: float | None = None) -> None:
        self._start = self._last = _process_start() if start is None else start
        self._rows: list[tuple[str, float]] = []
        self._steps: list[tuple[str, float]] = []

    def mark(self, stage: str) -> None:
        """A stage has ended now."""
        now = time.monotonic()
        self._rows.append((stage, now - self._last))
        self._last = now

    def inside(self, task: Object) -> None:
        """What the daemon did meanwhile: the steps of its task."""
        for step in task["status"].get("steps", []):
            if step.get("started") and step.get("ended"):
                self._steps.append((phrase({**step, "message": ""}), step["ended"] - step["started"]))

    def stages(self) -> list[tuple[str, float]]:
        """Each stage and its seconds, the daemon's own below the wait for them; last the whole."""
        found = []
        for stage, seconds in self._rows:
            found.append((stage, seconds))
            if stage == WAITING:
                found += [(f"  {step}", took) for step, took in self._steps]
        return [*found, ("all of it", self._last - self._start)]

    def report(self) -> None:
        """One line a stage, on stderr."""
        for stage, seconds in self.stages():
            failures.line(f"{seconds * 1000:8.0f} ms  {stage}")


def summarize(runs: Sequence[Timings]) -> None:
    """One line a stage of many runs, on stderr: its median, and what nine of ten stay below."""
    took: dict[str, list[float]] = {}
    for run in runs:
        for stage, seconds in run.stages():
            took.setdefault(stage, []).append(seconds)
    import statistics  # brings much along that one run has no use for

    failures.line(f"  median       p90  of {len(runs)} runs")
    for stage in sorted(took, key=lambda stage: stage == "all of it"):  # what only some runs had comes before the end
        rows = sorted(took[stage])
        ninth = rows[math.ceil(0.9 * len(rows)) - 1]
        failures.line(f"{statistics.median(rows) * 1000:5.0f} ms  {ninth * 1000:5.0f} ms  {stage}")


WAITING = "waiting for the guest"


def _process_start() -> float:
    """When this process was started, on the monotonic clock (to a hundredth of a second)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age)
