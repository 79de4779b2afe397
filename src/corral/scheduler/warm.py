"""How many machines are kept ready for each template: as many as are asked for while another is made.

Launches of a template are counted with a weight that fades (e-folding time :data:`FADE_S`), which gives their rate. One
that was used lately has one ready at least, one that was not has none: memory is lent, not given away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

FADE_S = 30.0
"""Long enough to see a rate in it, short enough to follow a burst that is over."""
CUSHION = 2.0
"""Launches come in bunches: twice what is expected."""


class Use(NamedTuple):
    """Launches of one template: how many, faded, as of ``at``: seconds on any clock, and the last of them."""

    level: float = 0.0
    at: float = -math.inf

    def again(self, now: float) -> Use:
        """With another launch."""
        return Use(self._faded(now) + 1.0, max(now, self.at))

    def rate(self, now: float) -> float:
        """Launches a second."""
        return self._faded(now) / FADE_S

    def _faded(self, now: float) -> float:
        return self.level * math.exp(-max(0.0, now - self.at) / FADE_S) if self.level else 0.0


class Want(NamedTuple):
    """A template that machines can be made ready of. ``cost``: bytes of memory that one takes while it waits."""

    id: str
    use: Use
    making_s: float
    cost: int


def wanted(want: Want, now: float, *, idle_s: float, most: int) -> int:
    """How many would be right if there were room for all."""
    if now - want.use.at > idle_s:
        return 0
    return min(most, max(1, math.ceil(CUSHION * want.use.rate(now) * want.making_s)))


def sizes(wants: Iterable[Want], now: float, *, room: int, idle_s: float, most: int) -> dict[str, int]:
    """How many there shall be of each, in ``room`` bytes, at most ``most`` together.

    Each gets one before one gets two, those in greater demand first.
    """
    order = sorted(wants, key=lambda want: (-want.use.rate(now), -want.use.at, want.id))
    full = {want.id: wanted(want, now, idle_s=idle_s, most=most) for want in order}
    given = dict.fromkeys(full, 0)
    left = most
    for _ in range(most):
        for want in order:
            if left and given[want.id] < full[want.id] and want.cost <= room:
                given[want.id] += 1
                room, left = room - want.cost, left - 1
    return given
