"""Forks that are made ahead: loaded, rehearsed (:mod:`corral.agent.templates.rehearsal`), nobody's; a launch that fits
gets one instead of having one made.

A VM gets its machine by getting its id: the transaction that creates the VM under the id of a ready machine removes the
key that says the machine is nobody's (:mod:`corral.store.ready`). So process, directory, disk, control groups, uuid and
MAC are the VM's from the start, and nothing is renamed. Everything here is made in this order: key, files, process, key
``ready``; and ended in the opposite one, so that a kill anywhere leaves what the next agent ends (it keeps none: ready
machines are made anew in less time than it would take to be sure of old ones).

How many there shall be is decided in :mod:`corral.scheduler.warm`. One is made at a time, and only while no VM starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import msgspec
import structlog

from corral.agent.host import Registration
from corral.agent.machine import machine_of, memory_net, wants_root, wants_seed
from corral.agent.picture import Picture
from corral.agent.ports import BootFiles, Joined
from corral.agent.settings import Settings
from corral.agent.templates.boot import HOSTNAME, clear, pretended
from corral.agent.templates.rehearsal import rehearse
from corral.agent.templates.stock import TemplateStock
from corral.agent.turns import Turns
from corral.engine.protocol import Engine, Machine, State
from corral.errors import CorralError, NotFound, Refused
from corral.host.hostkey import HostKey
from corral.model import Nic, Power, Template, TemplatePhase, Vm
from corral.runtime import Runtime
from corral.scheduler.warm import Use, Want, sizes
from corral.storage.seed import Seed
from corral.store.objects import Objects
from corral.store.ready import Offer, Ready, ReadyBook, kind_of

log = structlog.get_logger("warm")

LOOK_S = 5.0
"""Between two looks at those that wait, and at who wants some; a launch is followed by one at once."""
BUSY_S = 0.1
PRESSED_S = 60.0
"""None is made for so long after a VM lacked the memory."""
AGAIN_S = 30.0
"""After one could not be made none is tried of the same template for so long."""
FIRST_MAKING_S = 0.5
CLOSE_S = 5.0
"""One that is being made when the agent ends has this long to be finished."""


class Waiting(NamedTuple):
    """One that was made here. ``pid``: its process, ``key``: the SSH host key that its guest will get."""

    machine: Ready
    pid: int | None
    key: HostKey


@dataclass(slots=True)
class Demand:
    """What is known of one template's launches."""

    use: Use = field(default_factory=Use)
    making_s: float = FIRST_MAKING_S
    not_before: float = 0.0


class WarmPool:
    """One per host. ``host_id``: whose machines these are."""

    def __init__(
        self, objects: Objects, engine: Engine, joined: Joined, rt: Runtime, settings: Settings,
        *, host_id: str, picture: Picture, registration: Registration, stock: TemplateStock, turns: Turns,
    ) -> None:  # fmt: skip
        self._objects, self._engine, self._joined, self._rt = objects, engine, joined, rt
        self._settings, self._host_id, self._picture, self._registration = settings, host_id, picture, registration
        self._stock, self._turns = stock, turns
        self._book = ReadyBook(objects.store)
        self._mine: dict[str, Waiting] = {}
        self._demand: dict[str, Demand] = {}
        self._pressed = -PRESSED_S
        self._left = False
        """Some could not be ended."""
        self._turn = asyncio.Event()
        self._making: asyncio.Task[None] | None = None

    # What launches ask

    def holds(self, vm_id: str, template: Template | None) -> bool:
        """The VM has the id of a machine that was made for it: a fork of this template."""
        one = self._mine.get(vm_id)
        return one is not None and template is not None and one.machine.template == template.meta.id

    def key(self, vm_id: str) -> HostKey | None:
        """A host key for the VM, if a machine was made for it."""
        one = self._mine.get(vm_id)
        return one.key if one is not None else None

    def launched(self, vm_id: str, template: Template | None, pid: int | None) -> bool:
        """A VM has a process; whether it is the one that was made ahead. Its template is in demand."""
        one = self._mine.pop(vm_id, None)
        if template is not None and not template.spec.source:
            demand = self._demand.setdefault(template.meta.id, Demand())
            demand.use = demand.use.again(self._rt.clock.monotonic())
            self._turn.set()
        return one is not None and one.pid == pid

    def count(self, template_id: str) -> int:
        """How many of a template wait."""
        return sum(one.machine.template == template_id for one in self._waiting())

    def held(self) -> int:
        """Bytes of memory that they take."""
        return len(self._waiting()) * self._registration.overhead

    def press(self) -> bool:
        """A VM lacks the memory: all of them go; False: there is none."""
        self._pressed = self._rt.clock.monotonic()
        self._turn.set()
        return bool(self._waiting())

    def _waiting(self) -> list[Waiting]:
        """Those that no VM has, as far as the agent knows."""
        return [one for id, one in self._mine.items() if id not in self._picture.vms]

    # Keeping

    async def sweep(self) -> None:
        """Before anything else is done here: end what an earlier agent left. What resists is tried again later."""
        for offer in await self._book.all():
            if offer.machine.host == self._host_id:
                await self._try(self._end(offer))
        for seen in await self._engine.pool():
            if await self._vm(seen.id) is None:
                await self._try(self._clear(seen.id))
            else:  # the VM's, and not begun to be: it starts afresh
                await self._try(self._engine.remove(seen.id))

    async def _try(self, ending: Awaitable[None]) -> None:
        try:
            await ending
        except CorralError as error:
            log.warning("a warm machine could not be ended", error=error.message)
            self._left = True

    async def run(self) -> None:
        """Keep as many as are wanted, until cancelled."""
        if not self._settings.warm:
            await asyncio.Event().wait()
        await self._stock.known.wait()
        self._remember()
        while True:
            self._turn.clear()
            try:
                await self._round()
            except CorralError as error:
                log.warning("warm machines could not be looked after, tried again", error=error.message)
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._turn.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """End all: none of them is a VM."""
        if self._making is not None:  # threads are at work with a new process
            await asyncio.wait({self._making}, timeout=CLOSE_S)
            self._making.cancel()
        if not self._settings.warm:
            return
        await self._rt.faults.at("warm.ending")
        try:
            offers = await self._book.all()
        except CorralError as error:
            log.warning("warm machines cannot be ended, the next start does", error=error.message)
            return
        for offer in offers:
            if offer.machine.host == self._host_id:
                await self._try(self._end(offer))

    def _remember(self) -> None:
        """What was in use before this daemon began still is."""
        now = self._rt.clock.now()
        for template in self._stock.here():
            if template.status.used_at is not None and not template.spec.source:
                ago = max(0.0, now - template.status.used_at)
                self._demand[template.meta.id] = Demand(Use().again(self._rt.clock.monotonic() - ago))

    async def _round(self) -> None:
        if self._mine or self._left:
            await self._look()
        while True:
            shall = self._sizes()
            for template_id, number in shall.items():
                await self._shrink(template_id, number)
            short = [one for one in self._ready_ones() if self.count(one.meta.id) < shall.get(one.meta.id, 0)]
            if not short:
                return
            if self._turns.starting:  # nobody waits for this one
                await self._rt.clock.sleep(BUSY_S)
                continue
            work = self._make(min(short, key=lambda template: self.count(template.meta.id)))
            self._making = asyncio.get_running_loop().create_task(work, name="warm-make")
            await asyncio.shield(self._making)

    def _ready_ones(self) -> list[Template]:
        """Templates that machines can be made of, and their image here."""
        return [
            one for one in self._stock.here()
            if one.status.phase is TemplatePhase.READY and one.meta.deleted is None and not one.spec.source
            and self._stock.find(one.meta.id) is not None and self._files(one) is not None
        ]  # fmt: skip

    def _files(self, template: Template) -> BootFiles | None:
        image = self._picture.images.get(template.spec.image_id)
        try:
            files: BootFiles | None = self._joined.images.files(image.status.digest) if image is not None else None
        except NotFound:
            return None
        return files if files is not None and files.agent else None

    def _sizes(self) -> dict[str, int]:
        """How many there shall be of each template that has any, or can have."""
        now, cost = self._rt.clock.monotonic(), self._registration.overhead
        there = {one.meta.id for one in self._ready_ones()}
        self._demand = {id: demand for id, demand in self._demand.items() if id in self._picture.templates}
        trying = {id for id in there if now >= self._demand.get(id, Demand()).not_before}
        wants = [Want(id, one.use, one.making_s, cost) for id, one in self._demand.items() if id in trying]
        room = 0 if now - self._pressed < PRESSED_S else self._stock.left()
        found = sizes(wants, now, room=room, idle_s=self._settings.warm_idle_s, most=self._settings.warm_most)
        known = there | {one.machine.template for one in self._waiting()}
        return {id: self.count(id) if id in there - trying else found.get(id, 0) for id in known}

    async def _look(self) -> None:
        """Notice those that ended, and those whose VM does not want them any more."""
        offers = {offer.machine.id: offer for offer in await self._book.all()}
        well = {seen.id for seen in await self._engine.pool() if seen.state is State.CREATED}
        self._left = False
        for id in list(self._mine):
            if id not in offers:
                await self._given(id)
            elif id not in well:
                await self._try(self._end(offers[id]))
        for id in sorted(offers.keys() - self._mine.keys()):
            if offers[id].machine.host == self._host_id:
                await self._try(self._end(offers[id]))

    async def _given(self, id: str) -> None:
        """Its key is gone: it is a VM's. One that is not about to start here lets go of it."""
        vm = await self._vm(id)
        if vm is None or vm.status.host not in ("", self._registration.name):
            await self._clear(id)
            self._mine.pop(id, None)
        elif vm.spec.power is Power.STOPPED and self._mine.pop(id, None) is not None:
            try:
                await self._engine.remove(id)
            except Refused as error:  # it was started meanwhile, with a process of its own
                log.info("a warm machine is gone already", vm=id, error=error.message)

    async def _shrink(self, template_id: str, number: int) -> None:
        if self.count(template_id) <= number:
            return
        offers = [o for o in await self._book.all() if o.machine.id in self._mine and o.machine.template == template_id]
        for offer in offers[: self.count(template_id) - number]:
            await self._end(offer)

    async def _vm(self, id: str) -> Vm | None:
        try:
            return await self._objects.get(Vm, id)
        except NotFound:
            return None

    # Making and ending one

    async def _make(self, template: Template) -> None:
        demand = self._demand.setdefault(template.meta.id, Demand())
        began = self._rt.clock.monotonic()
        mac = "52:54:00:" + ":".join(f"{byte:02x}" for byte in self._rt.random.token(3)) if template.spec.cards else ""
        kind = kind_of(template.meta.project, template.spec)
        one = Ready(id=self._rt.random.id(), template=template.meta.id, host=self._host_id, mac=mac)
        await self._book.begin(kind, one)
        try:
            await self._rt.faults.at("warm.noted")
            key = await self._joined.host_key()
            vm = pretended(template, one.id, (Nic(mac=one.mac),) if one.mac else ())
            channels = self._engine.channels(one.id)
            seen = await self._engine.warm(
                await self._prepare(template, vm), partial(rehearse, self._joined, channels, self._rt, vm, key)
            )
            await self._rt.faults.at("warm.made")
        except (CorralError, OSError) as error:
            log.warning("none could be made ahead", template=template.meta.name, error=str(error))
            demand.not_before = self._rt.clock.monotonic() + AGAIN_S
            for offer in await self._book.all(kind):
                if offer.machine.id == one.id:
                    await self._try(self._end(offer))
            return
        self._mine[one.id] = Waiting(one, seen.pid, key)
        await self._book.offer(kind, one)
        self._stock.count(template.meta.id)
        demand.making_s = (demand.making_s + self._rt.clock.monotonic() - began) / 2
        await self._rt.faults.at("warm.offered")

    async def _prepare(self, template: Template, vm: Vm) -> Machine:
        """Its files and groups are there; the machine as a launch will want it, without what is not known yet."""
        id, disks, files = vm.meta.id, self._joined.disks, self._files(template)
        if files is None:
            raise Refused("its image is gone", code="failed")
        seed = None
        if wants_root(files):
            chain = next(
                drive.chain for drive in self._stock.usable(template.meta.id).machine.drives if drive.name == "root"
            )
            await disks.ensure_fork(id, [layer.path for layer in chain if layer.path != files.disk], None)
        if wants_seed(files):
            seed = await disks.ensure_seed(id, Seed(instance_id=id, hostname=HOSTNAME, default_user=files.default_user))
        joins = self._joined.groups.prepare(id)
        overhead = self._registration.overhead
        self._joined.groups.memory_limit(id, memory_net(template.spec.memory, overhead, forked=True))
        machine = machine_of(
            vm, files, root=disks.layers(id), seed=seed, ports=(), joins=joins, template=template.meta.id
        )
        return _nameless(machine, files)

    async def _end(self, offer: Offer) -> None:
        """Have nothing left of it, unless it is a VM's."""
        if not await self._book.withdraw(offer):
            return
        await self._rt.faults.at("warm.withdrawn")
        await self._clear(offer.machine.id)
        self._mine.pop(offer.machine.id, None)
        await self._book.forget(offer)

    async def _clear(self, id: str) -> None:
        await clear(self._engine, self._joined, self._rt, id)


def _nameless(machine: Machine, files: BootFiles) -> Machine:
    """Without a host name, which its VM brings along: a guest that restarts itself has the one on its disk, and is told
    again by its agent.
    """
    kernel = None if machine.kernel is None else msgspec.structs.replace(machine.kernel, cmdline=files.cmdline)
    cards = tuple(msgspec.structs.replace(card, hostname="") for card in machine.cards)
    return msgspec.structs.replace(machine, kernel=kernel, cards=cards)
