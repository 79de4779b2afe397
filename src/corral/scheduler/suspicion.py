"""When silence counts as hung: F(t) = F(t-1) + 1/L for each missed heartbeat; one that comes resets it.

A beat that was missed counts by what the guest could have done about it: one that got a tenth of the CPU time it wanted
is given ten times as long. So a guest that is starved by its weight, its limit or a busy host is not taken for a hung
one, and one that is hung and starved is still found.
"""

from __future__ import annotations

from typing import NamedTuple

MISSES = 3
"""L: heartbeats missed in a row until a VM is called unresponsive. At one each 5 s this is about 15 s."""
UNNOTICED = 0.05
"""Cores. A guest that waited less than this for a CPU was not kept from answering by that."""
LEAST = 0.05
"""A missed beat counts at least so much: a guest that gets next to nothing has twenty times as long, not for ever."""


class Suspicion(NamedTuple):
    """How suspicious one silent thing is: 0 to 1."""

    missed: float = 0.0
    limit: int = MISSES

    def beat(self, answered: bool, part: float = 1.0) -> Suspicion:
        """After one more heartbeat. ``part``: what a missed one counts, see :func:`part_of`."""
        return self._replace(missed=0.0 if answered else self.missed + part)

    @property
    def level(self) -> float:
        return min(1.0, self.missed / self.limit)

    @property
    def hung(self) -> bool:
        return self.missed >= self.limit


def part_of(used: float, waited: float) -> float:
    """What part of the CPU time that it wanted a guest has got, :data:`LEAST` to 1. Both in cores."""
    if waited <= UNNOTICED:
        return 1.0
    return max(LEAST, used / (used + waited))
