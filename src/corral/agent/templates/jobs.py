"""The templates of one host: their records and what is there, made true of each other.

A job makes one template; it is nothing durable, what it did is found on the host again. One guest boots for a template
at a time, and for one of the platform's own only while no VM starts. Every few seconds each is looked at: whether it
still can be forked from, who uses it, whether it is still needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from corral.agent.events import EventLog
from corral.agent.gate import EVICTION_S, Entrance
from corral.agent.host import Registration
from corral.agent.picture import Picture, boot_id
from corral.agent.ports import BootFiles, Joined
from corral.agent.progress import TaskBook
from corral.agent.templates.boot import Made, TemplateBoots
from corral.agent.templates.stock import TemplateStock
from corral.agent.turns import Turns
from corral.agent.verdict import Verdict
from corral.engine.protocol import Engine, State
from corral.engine.protocol import Template as Frozen
from corral.errors import Bug, CorralError, Refused
from corral.governor.protocol import VmPlan
from corral.model import Phase, TaskState, Template, TemplatePhase
from corral.model.template import making_takes
from corral.model.vm import Memory, start_of
from corral.runtime import KeyedQueue, Runtime
from corral.store.objects import Objects
from corral.units import format_size

log = structlog.get_logger("templates")

LOOK_S = 5.0
"""Between two looks at each template: use is written down this late, and staleness noticed."""
AGAIN_S = 600.0
"""The platform tries again so long after one of its own templates failed."""
BOOT_WEIGHT = 5.0
"""CPU weight of a guest that boots for a template, against 100 of a VM: nobody waits for it."""


class TemplateJobs:
    """One per host."""

    def __init__(
        self, objects: Objects, engine: Engine, joined: Joined, rt: Runtime,
        *, book: TaskBook, events: EventLog, picture: Picture, registration: Registration, entrance: Entrance,
        stock: TemplateStock, turns: Turns, poke_vm: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._stock, self._poke_vm = stock, poke_vm
        self._objects, self._engine, self._joined, self._rt = objects, engine, joined, rt
        self._book, self._events, self._picture = book, events, picture
        self._registration, self._entrance, self._turns = registration, entrance, turns
        self._boots = TemplateBoots(engine, joined, rt)
        self._queue = KeyedQueue(rt.clock, self._handle, workers=4, on_error=self._failed)
        self._place = asyncio.Semaphore(1)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._booting = ""
        self._unknown: set[str] = set()
        """Without a record when they were looked at last."""

    def poke(self, id: str) -> None:
        """Something about this template may have changed."""
        self._queue.add(id)

    async def run(self) -> None:
        """Serve until cancelled."""
        await self.look()
        looking = asyncio.get_running_loop().create_task(self._look_for_ever(), name="templates-look")
        try:
            await self._queue.run()
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def close(self) -> None:
        """Stop all jobs: they begin anew with the next start. A guest that boots for one is nobody's VM: it ends."""
        for id in list(self._jobs):
            await self._cancel(id)
        mine = [one for one in self._picture.templates.values() if one.status.host == self._registration.name]
        for template in mine:  # also one that was found and not taken up again yet
            if template.status.phase is not TemplatePhase.BUILDING or template.spec.source:
                continue
            await self._rt.faults.at("template.ending")
            try:
                await self._boots.clear(template.meta.id)
            except CorralError as error:
                log.warning("a template's guest could not be ended; the next start does", error=error.message)

    def _failed(self, id: str, error: Exception) -> None:
        if isinstance(error, CorralError):
            log.warning("a template could not be handled, tried again", template=id, error=error.message)
        else:
            log.error("a template could not be handled", template=id, exc_info=error)

    async def _look_for_ever(self) -> None:
        while True:
            await self._rt.clock.sleep(LOOK_S)
            if not self._picture.templates and not self._unknown:
                continue
            try:
                await self.look()
            except CorralError as error:
                log.warning("templates could not be looked at", error=error.message)

    async def look(self) -> None:
        """See what is on this host; whatever has a record here gets handled."""
        found = await self._engine.templates()
        self._stock.fill(found)
        unknown = {frozen.id: frozen for frozen in found if frozen.id not in self._picture.templates}
        for id in unknown.keys() & self._unknown:  # not one that has just been deleted, or whose record is on its way
            await self._adopt(unknown.pop(id))
        self._unknown = set(unknown)
        for id in self._picture.templates:
            self.poke(id)

    async def _adopt(self, frozen: Frozen) -> None:
        await self._stock.adopt(frozen)
        template = self._picture.templates.get(frozen.id)
        if template is None:
            return
        name, size = template.meta.name, f"{format_size(frozen.memory)} of memory, {format_size(frozen.disk)} on disk"
        text = f"a template without a record is on this host: {name} ({size}); corral template delete removes it"
        log.warning("a template has no record", template=frozen.id)
        self._events.emit(template, "UnknownTemplate", text, "warning")

    async def plans(self) -> list[VmPlan]:
        """The guest that boots for a template, for the governor of CPU time."""
        template = self._picture.templates.get(self._booting)
        if template is None:
            return []
        id = boot_id(template.meta.id)
        try:
            seen = await self._engine.inspect(id)
            if seen.state is not State.RUNNING or seen.pid is None:
                return []
            threads = await self._engine.vcpus(id)
        except CorralError:
            return []  # it has just ended
        return [VmPlan(id=id, project=template.meta.project, pid=seen.pid, threads=threads, weight=BOOT_WEIGHT)]

    # One template

    async def _handle(self, id: str) -> float | None:
        template = self._picture.templates.get(id)
        if template is None:
            return await self._gone(id)
        if template.status.host not in ("", self._registration.name):
            return None
        if template.meta.deleted is not None:
            return await self._delete(template)
        if id in self._stock.leaving:
            await self._stock.retire(template)
            return 0.0
        phase = template.status.phase
        if phase is TemplatePhase.READY:
            return await self._ready(template)
        if phase is TemplatePhase.STALE:
            return await self._stale(template)
        if phase is TemplatePhase.ERROR:
            return await self._erroneous(template)
        if phase is TemplatePhase.LOST:
            await self._lost(template)
            return None
        left, verdict = self._book.due(id)
        if verdict is not None:
            await self._cancel(id)
            assert verdict.error is not None
            await self._give_up(template, verdict.error, verdict.state)
            return None
        if id not in self._jobs:
            self._start(template)
        return left

    async def _ready(self, template: Template) -> float | None:
        id = template.meta.id
        frozen = self._stock.find(id)
        if frozen is None or frozen.stale:
            reason = frozen.stale if frozen is not None else "its files are gone"
            await self._stock.set(id, phase=TemplatePhase.STALE, reason=reason)
            self._events.emit(template, "Stale", f"template {template.meta.name} is stale: {reason}", "warning")
            return 0.0
        await self._end(id, Verdict(TaskState.DONE))
        forks = self._forks(id)
        used = self._stock.last_use(id)
        await self._stock.set(id, forks=forks, warm=self._stock.warm(id), used_at=used or template.status.used_at)
        image = self._picture.images.get(template.spec.image_id)
        changed = image is None or image.meta.deleted is not None or image.status.digest != template.status.digest
        if changed and not template.spec.source:
            await self._stock.set(id, phase=TemplatePhase.STALE, reason="its image is not what it was made from")
            return 0.0
        if template.spec.source and not forks and not self._awaited(id):
            await self._stock.retire(template)
        return None

    async def _stale(self, template: Template) -> float | None:
        """One of the platform's goes (the next launch makes another); one that was asked for is made again."""
        id = template.meta.id
        await self._end(id, Verdict(TaskState.FAILED, CorralError(template.status.reason, code="stale")))
        if self._forks(id):
            return LOOK_S
        image = self._picture.images.get(template.spec.image_id)
        if template.spec.auto or image is None:
            await self._stock.retire(template)
            return None
        await self._engine.discard(id)
        self._stock.drop(id)
        await self._stock.set(id, phase=TemplatePhase.PENDING, hardware="", digest="", memory=0, disk=0, made_at=None)
        return 0.0

    async def _erroneous(self, template: Template) -> float | None:
        status = template.status
        await self._end(template.meta.id, Verdict(TaskState.FAILED, CorralError(status.reason or "it failed")))
        if not template.spec.auto:
            return None
        left = template.meta.created + AGAIN_S - self._rt.clock.now()
        if left <= 0:
            await self._stock.retire(template)
            return None
        return left

    async def _lost(self, template: Template) -> None:
        """It stays until a person deletes it, or a VM needs its memory."""
        if self._stock.find(template.meta.id) is None:
            await self._stock.retire(template)
        else:
            await self._stock.set(template.meta.id, forks=self._forks(template.meta.id))

    def _forks(self, id: str) -> int:
        """VMs forked from it that have a process."""
        alive = (self._picture.vms.get(vm_id) for vm_id in self._picture.alive)
        return sum(vm is not None and start_of(vm).template_id == id for vm in alive)

    def _awaited(self, id: str) -> bool:
        """VMs that have yet to be forked from it."""
        waiting = (vm for vm in self._picture.vms.values() if vm.spec.template == id and vm.meta.deleted is None)
        return any(not start_of(vm).done and vm.status.phase is not Phase.ERROR for vm in waiting)

    # Making

    def _start(self, template: Template) -> None:
        id = template.meta.id
        job = asyncio.get_running_loop().create_task(self._job(template), name=f"template-{template.meta.name}")
        self._jobs[id] = job
        job.add_done_callback(lambda done: self._jobs.pop(id, None) if self._jobs.get(id) is done else None)

    async def _job(self, template: Template) -> None:
        id = template.meta.id
        try:
            made = await (self._freeze(template) if template.spec.source else self._boot(template))
            self._stock.put(made.frozen)
            await self._rt.faults.at("template.made")
            await self._stock.set(
                id, phase=TemplatePhase.READY, reason="", digest=self._files(template).digest, agent=made.agent,
                hooks=made.hooks, hardware=made.frozen.hardware, memory=made.frozen.memory, disk=made.frozen.disk,
                pause_s=made.frozen.pause_s, made_at=made.frozen.made_at,
            )  # fmt: skip
            self._events.emit(template, "Ready", f"template {template.meta.name} is ready")
        except CorralError as error:
            if error.code != "stale":
                await self._give_up(template, error, TaskState.FAILED)
        except Exception as error:
            # Not what the world did (that is a CorralError), but what we did: not begun again and again all the same.
            log.exception("a template could not be made", template=template.meta.name)
            await self._give_up(template, Bug(f"it could not be made: {error!r}"), TaskState.FAILED)
        self.poke(id)
        for vm_id in self._picture.waiting_for(id):
            self._poke_vm(vm_id)

    async def _freeze(self, template: Template) -> Made:
        vm = self._picture.vms.get(template.spec.source)
        if vm is None or vm.status.phase is not Phase.RUNNING:
            raise Refused("the VM that it was to be frozen from does not run", code="wrong-phase")
        await self._have_room(template)
        await self._stock.set(template.meta.id, phase=TemplatePhase.BUILDING, reason="", host=self._registration.name)
        return await self._boots.freeze(template, vm, self._files(template), self._teller(template.meta.id))

    async def _boot(self, template: Template) -> Made:
        id = template.meta.id
        self._book.step(id, "turn", "waits for another template")
        async with self._place:
            while template.spec.auto and self._turns.starting:
                await self._rt.clock.sleep(1.0)
            self._booting = id
            try:
                await self._stock.set(id, host=self._registration.name)
                await self._have_room(template)
                await self._stock.set(id, phase=TemplatePhase.BUILDING, reason="", host=self._registration.name)
                return await self._boots.make(template, self._files(template), self._teller(id))
            finally:
                self._booting = ""

    async def _have_room(self, template: Template) -> None:
        """Wait until there is the memory to make it. One of the platform's does not wait: there are better uses."""
        id, spec = template.meta.id, template.spec
        times = making_takes(spec)
        while why := self._entrance.lacks(Memory(size=times * spec.memory), spec.cpus, but=id):
            why = f"{why} (a template takes its memory twice while it is made)" if times > 1 else why
            if spec.auto and not spec.source:
                raise Refused(why, code="no-capacity")
            if self._stock.evict():
                self._book.step(id, "turn", "waits for the memory of a template that nobody uses")
                await self._rt.clock.sleep(EVICTION_S)
                continue
            if spec.source:
                raise Refused(f"there is no memory for a copy of it: {why}", code="no-capacity", hint="stop other VMs")
            self._book.step(id, "turn", why)
            await self._rt.clock.sleep(LOOK_S)

    def _teller(self, id: str) -> Any:
        return lambda step, message: self._book.step(id, step, message)

    def _files(self, template: Template) -> BootFiles:
        image = self._picture.images.get(template.spec.image_id)
        if image is None:
            raise Refused(f"its image {template.spec.image} is gone", code="failed")
        files: BootFiles = self._joined.images.files(image.status.digest)
        return files

    async def _give_up(self, template: Template, error: CorralError, state: TaskState) -> None:
        """It cannot be made: nothing of the attempt stays but its record, which says why."""
        id = template.meta.id
        reason = error.message + (f" ({error.hint})" if error.hint else "")
        if not template.spec.source:
            await self._boots.clear(id)
        await self._stock.set(id, phase=TemplatePhase.ERROR, reason=reason)
        await self._end(id, Verdict(state, error))
        self._events.emit(template, "Failed", f"template {template.meta.name}: {reason}", "error")

    async def _end(self, id: str, verdict: Verdict) -> None:
        template = self._picture.templates.get(id)
        result: dict[str, Any] = {}
        if template is not None and verdict.state is TaskState.DONE:
            result = {"template": template.meta.name, "pause_s": template.status.pause_s}
        for task in self._book.of(id):
            await self._book.finish(task, verdict, result)

    async def _cancel(self, id: str) -> None:
        job = self._jobs.pop(id, None)
        if job is not None:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    # The way out

    async def _delete(self, template: Template) -> float | None:
        """Asked to go: what is on the host first, its record last."""
        id = template.meta.id
        await self._cancel(id)
        if not template.spec.source:
            await self._boots.clear(id)
        await self._rt.faults.at("template.delete")
        try:
            await self._engine.discard(id)
        except Refused as error:
            if error.code != "in-use":
                raise
            await self._stock.set(id, reason=error.message)
            return LOOK_S
        self._stock.drop(id)
        await self._rt.faults.at("template.discarded")
        if not await self._book.remove(Template, id):
            return 0.1
        self._picture.bury(id)
        return None

    async def _gone(self, id: str) -> float | None:
        """The record was removed: its job and its tasks end. What is on the host stays, and is told of."""
        if self._stock.find(id) is not None:
            self._unknown.add(id)
        await self._cancel(id)
        await self._end(id, Verdict(TaskState.CANCELLED, Refused("the template was deleted", code="cancelled")))
        return None
