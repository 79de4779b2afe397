"""Where the time of a command went, stage by stage; the daemon's own stages are read from the task's steps."""

from __future__ import annotations

import os
import time
from pathlib import Path

from corral.cli import failures
from corral.cli.output import Object
from corral.cli.progress import phrase


class Timings:
    """Stages one after the other, from the start of this process on."""

    def __init__(self) -> None:
        self._start = self._last = _process_start()
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

    def report(self) -> None:
        """One line a stage, on stderr."""
        for stage, seconds in self._rows:
            _line(stage, seconds)
            if stage == WAITING:
                for step, took in self._steps:
                    _line(f"  {step}", took)
        _line("all of it", self._last - self._start)


WAITING = "waiting for the guest"


def _line(stage: str, seconds: float) -> None:
    failures.line(f"{seconds * 1000:8.0f} ms  {stage}")


def _process_start() -> float:
    """When this process was started, on the monotonic clock (to a hundredth of a second)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age)
