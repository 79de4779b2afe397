"""How a grant moves to its target: in steps, so that a guest never sees a cliff.

Classic form, C_i(t) = C_i(t-1) + 1/K: the whole of a resource is reached in K equal steps. Growth is always stepped. A
cut is immediate where the resource can be taken away at once (CPU time, disk, network), and paced by the same steps
where the guest has to give it back (memory).
"""

from __future__ import annotations

from typing import Any

CPU_STEPS = 4
"""K for CPU time: at a decision each 100 to 250 ms, a whole CPU is had within a second."""
DISK_STEPS = 4
"""O for a disk's limits, one step a second."""


def ramp(now: Any, target: Any, whole: Any, steps: int, *, paced: bool = False) -> Any:
    """The next grant after ``now``, at most ``whole / steps`` nearer to ``target``.

    ``paced``: a cut goes by steps too. All three in one unit; exact with Fractions.
    """
    step = whole / steps
    if target >= now:
        return min(target, now + step)
    return max(target, now - step) if paced else target
