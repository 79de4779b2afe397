"""How a grant moves to its target: in steps, so that a guest never sees a cliff.

Classic form, C_i(t) = C_i(t-1) + 1/K: the whole of a resource is reached in K equal steps. A cut is immediate: CPU time
and disk can be taken away at once. (Memory the guest has to give back: :mod:`corral.scheduler.memory`.)
"""

from __future__ import annotations

from typing import Any

CPU_STEPS = 4
"""K for CPU time: at a decision each 100 to 250 ms, a whole CPU is had within a second."""
DISK_STEPS = 4
"""O for a disk's limits, one step a second."""


def ramp(now: Any, target: Any, whole: Any, steps: int) -> Any:
    """The next grant after ``now``, at most ``whole / steps`` nearer to ``target``.

    All three in one unit; exact with Fractions.
    """
    return min(target, now + whole / steps)
