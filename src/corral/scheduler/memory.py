"""Who gives back memory when it is short, and who gets it back first: the idle-memory tax.

A VM that holds P bytes, of which the fraction f is in use, and has S shares, pays for each byte

    ρ = S / (P·(f + k·(1−f))),   k = 1/(1−τ),   τ = 0.75

so that an idle byte costs k = 4 times as much as a used one (Waldspurger, Memory Resource Management in VMware ESX
Server, OSDI 2002, section 5). Memory is taken where ρ is lowest until it is the same everywhere. With U = f·P bytes in
use that is P = τ·U + λ·(1−τ)·S: everybody keeps a part of what is used, the rest goes by shares. λ is found by the
water-filling of CPU shares (:mod:`corral.scheduler.shares.fill`), between what each must keep and what each may have.

All of it only under pressure. :func:`plan` is asked again and again with what is seen and says what each guest is to
have next; it goes there in steps, and leaves everybody alone while there is enough. Amounts are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from corral.scheduler.shares.fill import fill
from corral.units import MIB

TAX = 0.75
"""τ: the part of its idle memory that a VM can lose to one that uses its own, other things being equal."""
MARGIN_PART, MARGIN_LEAST = 16, 16 * MIB
"""A guest keeps what it uses and this much more (a sixteenth of its size, but so much at least): asked for more, it
tries for ever and starves itself, as measured."""
STEPS, STEP_LEAST = 2, 16 * MIB
"""A grant goes from all to nothing or back in at most so many steps: few, since a guest that grows meanwhile uses what
was to be taken from it, and then it cannot be taken any more."""
STILL = 2 * MIB
"""Smaller moves are not made: what a guest uses changes all the time by a little."""
HIGH, LOW = 16, 8
"""Pressure begins when less than a 16th of the budget is free, and is over when an 8th is: no flapping between."""
STALLED, CALM = 10.0, 5.0
"""Per cent of time in which something on the host waited for memory (PSI ``some avg10``): pressure, and none."""


class Claim(NamedTuple):
    """One VM. ``size``: what its owner wants it to have, at most what its hardware has. ``granted``: what it has now.
    ``used``: what its guest cannot give back (None: it does not say, and nothing is taken from it)."""

    size: int
    granted: int
    used: int | None
    reserve: int = 0
    weight: int = 100


class Pool(NamedTuple):
    """What all VMs of a host share. ``held``: what their processes have of the host's memory, ``overhead`` of it what
    is no guest's, ``growth`` what came since the last look (and will come again until the next: better early than
    late). ``available`` and ``kept``: what the host has left, and wants to keep for itself. ``stalled``: PSI."""

    budget: int
    held: int
    overhead: int = 0
    growth: int = 0
    available: int = 1 << 62
    kept: int = 0
    stalled: float = 0.0

    @property
    def pressed(self) -> bool:
        """Memory is short: in the budget, or on the host itself."""
        return self.crowded or self.available < self.kept // 2 or self.stalled > STALLED

    @property
    def crowded(self) -> bool:
        """The budget is nearly used up, or will be at the next look."""
        return self.held + self.growth > self.budget - self.budget // HIGH

    @property
    def room(self) -> int:
        """What can be given back without making it short again; 0 or less: nothing."""
        if self.stalled > CALM:
            return 0
        return min(self.budget - self.budget // LOW - self.held - self.growth, self.available - self.kept)


def margin(size: int) -> int:
    """What a guest has beyond what it uses, at least."""
    return max(MARGIN_LEAST, size // MARGIN_PART)


def least(claim: Claim) -> int:
    """What a VM keeps, come what may: its reservation, and what its guest uses with a margin. One that uses all it has
    keeps all of that; more it gets only where there is more."""
    needed = claim.granted if claim.used is None else min(claim.granted, claim.used + margin(claim.size))
    return max(min(claim.reserve, claim.size), needed)


def most(claim: Claim) -> int:
    """What a VM may have: its size, unless it uses more (it was made smaller while it ran)."""
    return max(claim.size, least(claim))


def entitled(total: Any, claims: Sequence[Claim], tax: Any = TAX) -> list[Any]:
    """Divide ``total`` by the taxed price, each between :func:`least` and :func:`most`. What cannot be had is missing:
    where all they must keep is more than ``total``, they keep it."""
    floors, ceilings = [least(claim) for claim in claims], [most(claim) for claim in claims]
    if total <= sum(floors):
        return list(floors)
    kept = [tax * (claim.granted if claim.used is None else claim.used) for claim in claims]
    above = [floor - own for floor, own in zip(floors, kept, strict=True)]
    limit = np.array([top - own for top, own in zip(ceilings, kept, strict=True)])
    weight = np.array([claim.weight * (1 - tax) for claim in claims])
    filled = fill(total - sum(kept), weight, np.array(above), limit, limit).entitlement
    return [own + part for own, part in zip(kept, filled, strict=True)]


def plan(pool: Pool, claims: Sequence[Claim]) -> list[int]:
    """What each VM is to be granted next. One that is to stay as it is gets what it has."""
    ceilings = [most(claim) for claim in claims]
    granted = [min(claim.granted, top) for claim, top in zip(claims, ceilings, strict=True)]
    goals: list[Any] = [max(least(claim), now) for claim, now in zip(claims, granted, strict=True)]
    if pool.pressed:
        goals = entitled(_bearable(pool, sum(granted)), claims)
    elif pool.room > 0:
        # Half of it at a time: a guest takes a moment to use what it got, and only then is it seen as held.
        more = entitled(sum(granted) + max(STILL, pool.room // 2), claims)
        goals = [max(goal, now) for goal, now in zip(more, granted, strict=True)]
    elif any(_short(claim) for claim in claims):
        goals = entitled(sum(granted), claims)
    return [_step(claim, int(goal), top) for claim, goal, top in zip(claims, goals, ceilings, strict=True)]


def missing(pool: Pool, claims: Sequence[Claim]) -> int:
    """Bytes that would have to be taken back and cannot be: everybody has but what they must keep. 0: none.

    Of a guest that does not say what it needs nothing is known; and what may be needed soon is not missing yet.
    """
    now = pool._replace(growth=0)
    if not now.pressed or any(claim.used is None for claim in claims):
        return 0
    granted = sum(min(claim.granted, most(claim)) for claim in claims)
    return max(0, sum(least(claim) for claim in claims) - _bearable(now, granted))


def _bearable(pool: Pool, granted: int) -> int:
    """What all guests together may have under pressure: so little that the budget holds even if they use all of it."""
    total = granted
    if pool.crowded:
        total = min(total, pool.budget - pool.budget // LOW - pool.overhead)
    if pool.available < pool.kept // 2:
        total = min(total, granted - (pool.kept - pool.available))
    if pool.stalled > STALLED:
        total = min(total, granted - granted // HIGH)
    return max(0, total)


def _short(claim: Claim) -> bool:
    """Its guest has used up half of its margin, and is entitled to more than it has."""
    if claim.used is None or claim.granted >= claim.size:
        return False
    return claim.granted - claim.used < margin(claim.size) // 2


def _step(claim: Claim, goal: int, top: int) -> int:
    """One step towards the goal; none for a small difference, except up to all that it may have."""
    way = goal - claim.granted
    if abs(way) < STILL and goal != top:
        return claim.granted
    pace = max(STEP_LEAST, max(claim.size, claim.granted) // STEPS)
    return claim.granted + max(-pace, min(pace, way))
