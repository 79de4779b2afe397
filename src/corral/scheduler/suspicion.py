"""When silence counts as hung: F(t) = F(t-1) + 1/L for each missed heartbeat; one that comes resets it."""

from __future__ import annotations

from typing import NamedTuple

MISSES = 3
"""L: heartbeats missed in a row until a VM is called unresponsive. At one each 5 s this is about 15 s."""


class Suspicion(NamedTuple):
    """How suspicious one silent thing is: 0 to 1."""

    missed: int = 0
    limit: int = MISSES

    def beat(self, answered: bool) -> Suspicion:
        """After one more heartbeat."""
        return self._replace(missed=0 if answered else self.missed + 1)

    @property
    def level(self) -> float:
        return min(1.0, self.missed / self.limit)

    @property
    def hung(self) -> bool:
        return self.missed >= self.limit
