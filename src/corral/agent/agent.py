"""The loop of one host: watch records, look at the host, decide, do one thing, look again.

On start it first rebuilds its picture from the host (processes, disks) and the store, and only then acts. Machines that
no record knows are left alone and told about; machines that records know are joined again (guest, serial line) and go
on as if nothing had been. Deciding is in :mod:`corral.agent.reconcile`, doing in :mod:`corral.agent.steps`.
"""

from __future__ import annotations

from contextlib import aclosing, suppress

import structlog

from corral.agent.ends import Ends
from corral.agent.enforcement import enforcement
from corral.agent.events import EventLog
from corral.agent.gate import Entrance
from corral.agent.grants.accounts import Accounts
from corral.agent.grants.cpu import CpuGrants
from corral.agent.grants.disk import DiskGrants
from corral.agent.grants.memory import MemoryGrants
from corral.agent.guests import Guests
from corral.agent.handler import VmHandler
from corral.agent.host import Registration
from corral.agent.images import ImageJobs
from corral.agent.meter import Meter
from corral.agent.picture import Picture
from corral.agent.ports import Joined
from corral.agent.progress import TaskBook
from corral.agent.reconcile import OFF_STATES
from corral.agent.records import VmRecords
from corral.agent.settings import Settings
from corral.agent.steps import Steps, keys_of
from corral.agent.templates.jobs import TemplateJobs
from corral.agent.templates.pool import WarmPool
from corral.agent.templates.stock import TemplateStock
from corral.agent.templates.welcome import Welcome
from corral.agent.turns import Turns
from corral.engine.protocol import Engine, EngineEvent
from corral.errors import CorralError, Refused, Unavailable
from corral.model import Host, Image, Phase, Task, Template, Vm
from corral.runtime import KeyedQueue, Runtime, Supervisor
from corral.scheduler.suspicion import part_of
from corral.store.objects import ObjectChange, Objects

log = structlog.get_logger("agent")


class Agent:
    """One host's agent.

    Args:
        joined: images, disks, guests, consoles, facts and ports of this host (:mod:`corral.agent.ports`).
        host_id: the host's UUID, for ever. ``host_name``: what VMs are placed by, unless it has another name already.
        ssh_key: Corral's own public key (OpenSSH), put into every guest; empty for none.
    """

    def __init__(
        self, objects: Objects, engine: Engine, joined: Joined, rt: Runtime,
        *, host_name: str, host_id: str, ssh_key: str = "", settings: Settings | None = None,
    ) -> None:  # fmt: skip
        self.objects, self.engine, self.joined, self.rt = objects, engine, joined, rt
        self.settings = settings or Settings()
        self.picture = Picture()
        self.events = EventLog(objects, rt)
        self.book = TaskBook(objects, rt, joined.consoles.tail)
        self.guests = Guests(engine, joined.connect_guest, rt, self.settings, self._poke, self._part)
        self.records = VmRecords(objects, self.picture, self.events, joined.consoles.tail)
        limits = {one.resource: one.how for one in enforcement(joined.groups)}
        self.registration = Registration(
            objects, engine, joined.facts, rt, self.settings, host_name, host_id, limits=limits
        )
        self.images = ImageJobs(
            objects, joined.images, rt, self.settings,
            book=self.book, events=self.events, picture=self.picture, registration=self.registration,
        )  # fmt: skip
        self.turns = Turns(joined.facts().cpus + self.settings.starting_extra, self._poke)
        self.stock = TemplateStock(
            objects, engine, joined, rt, self.settings, picture=self.picture, registration=self.registration,
            poke=lambda id: self.templates.poke(id), pool=lambda: self.pool,
        )  # fmt: skip
        self.pool = WarmPool(
            objects, engine, joined, rt, self.settings, host_id=host_id, picture=self.picture,
            registration=self.registration, stock=self.stock, turns=self.turns,
        )  # fmt: skip
        self.entrance = Entrance(self.picture, joined, self.turns, self.registration, self.settings, self.stock)
        self.templates = TemplateJobs(
            objects, engine, joined, rt, book=self.book, events=self.events, picture=self.picture,
            registration=self.registration, entrance=self.entrance, stock=self.stock, turns=self.turns,
            poke_vm=self._poke,
        )  # fmt: skip
        welcome = Welcome(
            engine, joined, rt, picture=self.picture, events=self.events, keys=lambda vm: keys_of(vm, ssh_key)
        )
        self.steps = Steps(
            engine, joined, objects, rt, guests=self.guests, book=self.book, records=self.records,
            picture=self.picture, stock=self.stock, pool=self.pool, welcome=welcome, ssh_key=ssh_key,
        )  # fmt: skip
        ends = Ends(rt, self.settings, book=self.book, records=self.records)
        handler = VmHandler(
            objects, engine, rt, self.settings, picture=self.picture, guests=self.guests, book=self.book,
            records=self.records, steps=self.steps, ends=ends, events=self.events, entrance=self.entrance,
            turns=self.turns, registration=self.registration, poke=self._poke,
        )  # fmt: skip
        self.queue = KeyedQueue(rt.clock, handler.handle, workers=self.settings.workers, on_error=self._failed)
        self.cpu = CpuGrants(
            objects, engine, self.picture, self.registration, joined.governing, rt, self.templates.plans
        )
        self.accounts = Accounts(self.picture, joined.governing, self.events, rt)
        self.memory = MemoryGrants(engine, self.picture, self.registration, joined, self.events, rt, self.stock.held)
        self.meter = Meter(
            objects, self.picture, self.registration, joined, self.accounts, engine, rt, granted=self.memory.of
        )  # fmt: skip
        self.disk = DiskGrants(engine, self.picture, self.registration, self.events, rt)
        self._supervisor = Supervisor(rt.clock)

    @property
    def host_name(self) -> str:
        """What VMs here are placed by."""
        return self.registration.name

    async def run(self) -> None:
        """Serve until cancelled. VMs go on running afterwards."""
        await self.pool.sweep()
        revision = await self._survey()
        try:
            for name, serve in (
                ("events", self.events.run), ("queue", self.queue.run), ("engine-events", self._hear),
                ("registration", self.registration.run), ("images", self.images.run),
                ("templates", self.templates.run), ("governor", self.joined.governing.run), ("cpu", self.cpu.run),
                ("accounts", self.accounts.run), ("disk", self.disk.run), ("memory", self.memory.run),
                ("warm", self.pool.run),
            ):  # fmt: skip
                self._supervisor.start(name, serve)
            await self._follow(revision)
        finally:
            await self.close()

    async def close(self) -> None:
        """Let go of everything; nothing that runs is touched."""
        await self._supervisor.close()
        await self.images.close()
        await self.guests.close()
        await self.joined.consoles.close()
        await self.book.close()
        self.turns.close()
        await self.templates.close()
        await self.pool.close()
        self.joined.groups.close()

    # What is wanted: the records

    async def _survey(self) -> int:
        """See what is on this host before anything is done; returns the store's revision that was read."""
        machines = await self.engine.inventory()
        disks = self.joined.disks.inventory()
        about = await self.registration.known()
        revision = await self._read()
        self.picture.alive = {m.id for m in machines if m.state not in OFF_STATES}
        for machine in machines:
            if machine.id not in self.picture.vms and not self.picture.boots_for_template(machine.id):
                text = f"a machine without a record ({machine.id}, {machine.state}, pid {machine.pid}) is left alone"
                self._tell_host(about, "UnknownMachine", text)
        for id in self.joined.groups.inventory():
            if not (id in self.picture.vms or id in self.picture.alive or self.picture.boots_for_template(id)):
                with suppress(Refused):  # somebody is in it: a machine without a record, told above
                    self.joined.groups.remove(id)
        for id in disks:
            if id not in self.picture.vms and not self.picture.boots_for_template(id):
                self._tell_host(about, "UnknownVolume", f"disks of a VM without a record ({id}) are left alone")
        return revision

    def _tell_host(self, host: Host | None, reason: str, message: str) -> None:
        if host is None:
            log.warning(reason, message=message)
        else:
            self.events.emit(host, reason, message, "warning")

    async def _read(self) -> int:
        """Take in all records; everything that is ours gets handled."""
        vms = await self.objects.list(Vm)
        images = await self.objects.list(Image)
        templates = await self.objects.list(Template)
        tasks = await self.objects.list(Task)
        for id in sorted(set(self.picture.vms) - {vm.meta.id for vm in vms.items}):
            self.picture.bury(id)
            self._poke(id)
        for id in sorted(set(self.picture.images) - {image.meta.id for image in images.items}):
            self.picture.bury(id)
            self.images.poke(id)
        for id in sorted(set(self.picture.templates) - {template.meta.id for template in templates.items}):
            self.picture.bury(id)
            self.templates.poke(id)
        open_tasks = {task.meta.id for task in tasks.items if not task.status.state.final}
        self.book.keep(open_tasks)
        for image in images.items:
            self.picture.put(image)
            self.images.poke(image.meta.id)
        for template in templates.items:
            self.picture.put(template)
            self.templates.poke(template.meta.id)
        for task in tasks.items:
            self.book.put(task)
        for vm in vms.items:
            self.picture.put(vm)
            if vm.status.host == self.host_name:
                self.queue.add(vm.meta.id)
        for task in self.book.all():
            self._poke_task(task)
        return min(vms.revision, images.revision, templates.revision, tasks.revision)

    async def _follow(self, revision: int) -> None:
        """Follow the records for ever; after a loss read everything again."""
        while True:
            try:
                async with aclosing(
                    self.objects.watch(  # type: ignore[type-var]
                        Vm, Image, Template, Task, Host, from_revision=revision + 1
                    )
                ) as batches:
                    async for batch in batches:
                        for change in batch.changes:
                            self._changed(change)
                log.warning("the watch ended, reading everything again")
            except Unavailable as error:
                log.warning("the watch was lost, reading everything again", error=error.message)
            await self.rt.clock.sleep(0.2)
            try:
                revision = await self._read()
            except Unavailable as error:
                log.warning("the store is not available", error=error.message)
                await self.rt.clock.sleep(1.0)

    def _changed(self, change: ObjectChange) -> None:
        obj = change.object
        if isinstance(obj, Task):
            self.book.put(obj)
            self._poke_task(obj)
        elif isinstance(obj, Vm):
            if self.picture.put(obj):
                self._poke(obj.meta.id)
        elif isinstance(obj, Image):
            self.picture.put(obj)
            self.images.poke(obj.meta.id)
            for vm_id in self.picture.using(obj.meta.id):
                self._poke(vm_id)
        elif isinstance(obj, Template):
            self.picture.put(obj)
            self.templates.poke(obj.meta.id)
            for vm_id in self.picture.waiting_for(obj.meta.id):
                self._poke(vm_id)
        elif isinstance(obj, Host):
            self.registration.put(obj)
        elif change.kind == "task":
            self.book.drop(change.id)
        elif change.kind == "host":
            return
        else:
            self.picture.bury(change.id)
            pokes = {"image": self.images.poke, "template": self.templates.poke}
            pokes.get(change.kind, self._poke)(change.id)

    def _poke(self, vm_id: str) -> None:
        """Something about this VM may have changed."""
        self.queue.add(vm_id)

    def _poke_task(self, task: Task) -> None:
        if task.spec.target_kind == "image":
            self.images.poke(task.spec.target_id)
        elif task.spec.target_kind == "template":
            self.templates.poke(task.spec.target_id)
        elif task.spec.target_kind == "vm":
            self._poke(task.spec.target_id)

    # What is seen: the hypervisor

    async def _hear(self) -> None:
        """Events of machines; what they mean is read from the machine itself."""
        async with aclosing(self.engine.events()) as events:  # type: ignore[type-var]
            async for event in events:
                self._heard(event)

    def _heard(self, event: EngineEvent) -> None:
        if self.picture.boots_for_template(event.id):
            return  # the guest of a template in the making: whoever makes it looks at it
        vm = self.picture.vms.get(event.id)
        if event.kind == "reset":
            self.guests.rebooted(event.id)
            self.picture.of(event.id).running = self.rt.clock.monotonic()
            # One that we asked for, and the resets of a boot under way, are not the guest's doing.
            if vm is not None and vm.status.phase in (Phase.RUNNING, Phase.UNRESPONSIVE):
                self.events.emit(vm, "GuestReboot", event.message)
        elif event.kind == "disk-error":
            memory = self.picture.of(event.id)
            memory.disk_error, memory.disk_words = self.rt.clock.monotonic(), event.message
        self.queue.add(event.id)

    def _part(self, vm_id: str) -> float:
        """What part of the CPU time that it wants a VM gets, as the governor last saw."""
        report = self.joined.governing.report()
        for row in report.vms if report is not None else ():
            if row.id == vm_id:
                return part_of(row.used, max(row.wait, row.throttled))
        return 1.0

    def _failed(self, id: str, error: Exception) -> None:
        vm = self.picture.vms.get(id)
        if isinstance(error, CorralError):
            log.warning("a step failed, tried again", vm=vm.meta.name if vm else id, error=error.message)
            self.book.step(id, "trying again", error.message)
        else:
            log.error("a step failed unexpectedly", vm=vm.meta.name if vm else id, exc_info=error)
