"""Moves balloons: takes memory back from guests while it is short here, and makes a guest as small as its record says.

Looks once a second, more often while something moves. Guests are asked what they need only then: where no VM may be
given less than it has (nothing is overcommitted, every size is what it was started with) a look reads nothing but
records. What is to be moved is decided by :mod:`corral.scheduler.memory`. Nothing is remembered that could be lost: how
large a balloon is, the hypervisor knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from corral.agent.events import EventLog
from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import Joined
from corral.engine.protocol import Engine, MemorySight
from corral.errors import CorralError
from corral.model import Phase, Vm
from corral.runtime import Runtime, deadline
from corral.scheduler.memory import Claim, Pool, missing, plan
from corral.scheduler.place import amount, capacity_of

EVERY_S, BUSY_S = 1.0, 0.5
"""Between two looks: at rest, and while memory is short or a balloon moves."""
POLL_S = 1
"""What guests are asked for their figures, while these matter."""
FRESH_S = 5.0
"""Figures that are older (whole seconds, on the wall clock) are those of a guest that says nothing any more."""
ANSWER_S = 3.0
"""A hypervisor that takes longer is left alone for :data:`AWAY_S`: one that is silent must not hold up the others."""
AWAY_S = 6.0
AGAIN_S = 5.0
"""A balloon that holds something is looked at this often: its guest may have taken memory back in distress."""
SELDOM_S = 60.0
"""Every other balloon is looked at this often."""
ANSWERING = (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
"""Phases in which a guest may follow."""


class Granted(NamedTuple):
    """What a guest may use of its memory, and what it uses of that; None: it has not said so lately. Bytes."""

    granted: int
    used: int | None


class _Guest:
    """What is known of one process. ``at`` is when the guest last said what it has ``available``."""

    def __init__(self, sight: MemorySight, now: float) -> None:
        self.sight = sight
        self.used: int | None = None
        self.target = sight.granted
        """What it was last told to have: its balloon may be on the way."""
        self.looked = now
        self.polled = False

    def take(self, sight: MemorySight, now: float) -> None:
        """A new look. The guest's figure is older than the balloon's: the larger of the balloon's sizes around it is
        counted, so that a guest whose balloon moves is never thought to need less than it does."""
        if sight.available is not None and sight.at != self.sight.at:
            self.used = max(0, max(sight.granted, self.sight.granted) - sight.available)
        self.sight, self.looked = sight, now

    def needs(self, wall: float) -> int | None:
        """What it uses, if that is known."""
        said = self.sight.at
        return self.used if self.polled and said is not None and abs(wall - said) <= FRESH_S else None


class _Row(NamedTuple):
    """A VM that takes part in a look."""

    vm: Vm
    guest: _Guest
    claim: Claim


class MemoryGrants:
    """Run one per host. ``templates``: bytes that templates hold here, each once for all its forks."""

    def __init__(
        self, engine: Engine, picture: Picture, registration: Registration,
        joined: Joined, events: EventLog, rt: Runtime, templates: Callable[[], int],
    ) -> None:  # fmt: skip
        self._templates = templates
        self._engine, self._picture, self._registration = engine, picture, registration
        self._joined, self._events, self._rt = joined, events, rt
        self._guests: dict[tuple[str, int], _Guest] = {}
        self._away: dict[str, float] = {}
        self._held: int | None = None
        self._pressed = self._short = False

    async def run(self) -> None:
        """Keep every guest's memory as it should be, until cancelled."""
        while True:
            busy = await self.look()
            await self._rt.clock.sleep(BUSY_S if busy else EVERY_S)

    def of(self, vm: Vm) -> Granted | None:
        """What is known of a VM's memory; None: nothing yet."""
        guest = self._guests.get(_key(vm)) if vm.status.pid is not None else None
        return None if guest is None else Granted(guest.sight.granted, guest.needs(self._rt.clock.now()))

    async def look(self) -> bool:
        """Look once and move what is to be moved. True: look again soon."""
        here = [vm for id in sorted(self._picture.alive) if (vm := self._picture.vms.get(id)) is not None]
        here = [vm for vm in here if vm.status.host == self._registration.name and vm.status.pid is not None]
        await self._meet(here)
        rows = self._rows(here)
        moving = any({row.claim.granted, row.guest.target} != {row.claim.size} for row in rows)
        if not moving and all(row.claim.reserve >= row.claim.size for row in rows):
            self._held = None
            await self._rest(rows)
            return False
        pool = await self._pool(here)
        if not pool.pressed and not moving:
            self._tell(pool, 0)
            await self._rest(rows)
            return pool.growth > 0
        await self._ask(rows)
        rows = self._rows(here)
        claims = [row.claim for row in rows]
        targets = plan(pool, claims)
        # One that is to stay as it is may have been told otherwise a moment ago.
        moves = [
            (row, target) for row, target in zip(rows, targets, strict=True)
            if {row.claim.granted, row.guest.target} != {target}
        ]  # fmt: skip
        self._tell(pool, 0 if moves else missing(pool, claims))
        await asyncio.gather(*(self._move(row, target) for row, target in moves))
        unheard = any(row.claim.used is None and row.claim.granted != row.claim.size for row in rows)
        return bool(moves) or pool.pressed or unheard

    # What is seen

    async def _meet(self, here: Sequence[Vm]) -> None:
        """Look once at each new process, and now and then at one whose balloon holds something."""
        known = {_key(vm) for vm in here}
        self._guests = {key: guest for key, guest in self._guests.items() if key in known}
        now = self._rt.clock.monotonic()
        self._away = {id: until for id, until in self._away.items() if until > now}
        await asyncio.gather(*(self._first(vm) for vm in here if _key(vm) not in self._guests and self._can(vm)))
        old = [
            vm for vm in here
            if (guest := self._guests.get(_key(vm))) is not None and self._can(vm) and not guest.polled
            and now - guest.looked >= (AGAIN_S if guest.sight.granted < guest.sight.size else SELDOM_S)
        ]  # fmt: skip
        await asyncio.gather(*(self._see(vm) for vm in old))

    def _can(self, vm: Vm) -> bool:
        return vm.status.phase in ANSWERING and vm.meta.id not in self._away

    async def _first(self, vm: Vm) -> None:
        """A daemon before this one may have left its guest polled: begin at rest."""
        try:
            async with deadline(ANSWER_S, "the first look at its memory"):
                await self._engine.poll_memory(vm.meta.id, 0)
                sight = await self._engine.memory(vm.meta.id)
        except CorralError:
            self._leave(vm)
            return
        self._guests[_key(vm)] = _Guest(sight, self._rt.clock.monotonic())

    async def _see(self, vm: Vm) -> None:
        try:
            async with deadline(ANSWER_S, "a look at its memory"):
                sight = await self._engine.memory(vm.meta.id)
        except CorralError:
            self._leave(vm)
            return
        self._guests[_key(vm)].take(sight, self._rt.clock.monotonic())

    def _leave(self, vm: Vm) -> None:
        """It has just ended, or does not answer: not now."""
        self._away[vm.meta.id] = self._rt.clock.monotonic() + AWAY_S

    async def _ask(self, rows: Sequence[_Row]) -> None:
        """Have guests say what they need, and see what they have said."""
        asked = [row for row in rows if self._can(row.vm)]
        await asyncio.gather(*(self._poll(row, POLL_S) for row in asked if not row.guest.polled))
        await asyncio.gather(*(self._see(row.vm) for row in asked))

    async def _rest(self, rows: Sequence[_Row]) -> None:
        """Nothing has to be known any more."""
        await asyncio.gather(*(self._poll(row, 0) for row in rows if row.guest.polled and self._can(row.vm)))

    async def _poll(self, row: _Row, every_s: int) -> None:
        try:
            async with deadline(ANSWER_S, "switching its figures"):
                await self._engine.poll_memory(row.vm.meta.id, every_s)
        except CorralError:
            self._leave(row.vm)
            return
        row.guest.polled = every_s > 0

    async def _pool(self, here: Sequence[Vm]) -> Pool:
        """What all VMs hold together. Of a fork that is what it has of its own: the rest is its template's."""
        own = await self._joined.own([vm.status.pid for vm in here if vm.status.pid is not None])
        held = sum(one or 0 for one in own)
        overhead = len(here) * self._registration.overhead
        facts, spec = self._joined.facts(), self._registration.spec
        kept = self._registration.reserved(facts)
        growth, self._held = max(0, held - (self._held if self._held is not None else held)), held
        return Pool(
            budget=max(0, capacity_of(facts.memory - kept, spec.memory_budget) - self._templates()), held=held,
            overhead=overhead, growth=growth, available=facts.memory_available, kept=kept, stalled=facts.memory_stalled,
        )  # fmt: skip

    # What is done

    def _rows(self, here: Sequence[Vm]) -> list[_Row]:
        """Everybody whose memory has been seen, as :mod:`corral.scheduler.memory` wants it."""
        overcommitted, wall = self._registration.spec.memory_overcommit > 1.0, self._rt.clock.now()
        rows = []
        for vm in here:
            guest = self._guests.get(_key(vm))
            if guest is None:
                continue
            memory, sight = vm.spec.memory, guest.sight
            size = min(memory.size, sight.size)
            reserve = memory.reserve if memory.reserve is not None else 0 if overcommitted else size
            used = guest.needs(wall) if self._can(vm) else None
            rows.append(_Row(vm, guest, Claim(size, sight.granted, used, reserve, memory.weight)))
        return rows

    async def _move(self, row: _Row, target: int) -> None:
        row.guest.target = target
        try:
            async with deadline(ANSWER_S, "moving its balloon"):
                await self._engine.balloon(row.vm.meta.id, target)
        except CorralError:
            self._leave(row.vm)
            return
        await self._rt.faults.at("memory.ballooned")

    def _tell(self, pool: Pool, lacking: int) -> None:
        """An event when memory becomes short here, when there is none left to take back, and when it is over."""
        host = self._registration.host
        over = pool.pressed or (self._pressed and pool.room <= 0)  # over when there is room again, not before
        short = over and (lacking > 0 or self._short)
        if host is None or (over, short) == (self._pressed, self._short):
            return
        state = (
            f"VMs hold {amount(pool.held)} of {amount(pool.budget)}, the host has {amount(pool.available)} available"
        )
        if over and not self._pressed:
            self._events.emit(host, "MemoryPressure", f"{state}: taken back from those who use theirs least", "warning")
        if short and not self._short:
            text = f"{state}: guests use all they have, {amount(lacking)} more than there should be"
            self._events.emit(host, "MemoryShort", text, "error")
        if self._pressed and not over:
            self._events.emit(host, "MemoryRelaxed", f"{state}: given back")
        self._pressed, self._short = over, short


def _key(vm: Vm) -> tuple[str, int]:
    assert vm.status.pid is not None
    return vm.meta.id, vm.status.pid
