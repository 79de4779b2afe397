"""Gives every VM a host: filter → score → choose → commit.

Decided on a snapshot by :mod:`corral.scheduler.place`, committed by compare-and-swap on the VM's record, so that a
changed or deleted VM is looked at again instead of overwritten. What fits nowhere stays pending and says why, host by
host; it is looked at again when a host or another VM changes. Also removes the records of VMs that are deleted before
they had a host: no agent is in charge of those.
"""

from __future__ import annotations

from contextlib import aclosing

import msgspec
import structlog

from corral.controllers.follow import follow
from corral.errors import NotFound, Refused
from corral.model import Host, Image, ImagePhase, Phase, Power, Task, TaskState, Template, Vm, Volume
from corral.runtime import KeyedQueue, Runtime
from corral.scheduler.place import Room, choose, need_of, rooms, sentence
from corral.store.objects import ObjectChange, Objects, Remove, Update, Write

log = structlog.get_logger("placement")

RECHECK_S = 30.0
"""A VM that fits nowhere is looked at again this often, whatever happens."""


class Placement:
    """The placement loop. Run one; two at once waste work and break nothing."""

    def __init__(self, objects: Objects, rt: Runtime) -> None:
        self._objects, self._rt = objects, rt
        # One worker: two decisions at once would both count on the same free memory.
        self._queue = KeyedQueue(rt.clock, self._place, workers=1, on_error=self._failed)
        self._vms: dict[str, Vm] = {}
        self._hosts: dict[str, Host] = {}
        self._images: dict[str, Image] = {}
        self._templates: dict[str, Template] = {}
        self._waiting: dict[str, None] = {}  # in the order in which they came

    async def run(self) -> None:
        """Place until cancelled."""
        await follow("placement", self._queue, self._rt, self._read, self._follow)

    async def _read(self) -> int:
        hosts, images = await self._objects.list(Host), await self._objects.list(Image)
        templates, vms = await self._objects.list(Template), await self._objects.list(Vm)
        self._templates = {template.meta.id: template for template in templates.items}
        self._hosts = {host.meta.id: host for host in hosts.items}
        self._images = {image.meta.id: image for image in images.items}
        self._vms = {vm.meta.id: vm for vm in vms.items}
        for vm in sorted(vms.items, key=lambda vm: (-vm.spec.memory.size, vm.meta.created)):
            self._consider(vm)
        return min(hosts.revision, images.revision)

    async def _follow(self, revision: int) -> None:
        async with aclosing(
            self._objects.watch(Vm, Host, Image, Template, from_revision=revision + 1)  # type: ignore[type-var]
        ) as batches:
            async for batch in batches:
                for change in batch.changes:
                    self._changed(change)

    def _changed(self, change: ObjectChange) -> None:
        obj = change.object
        if isinstance(obj, Vm):
            known = self._vms.get(obj.meta.id)
            if known is None or known.meta.revision < obj.meta.revision:
                self._vms[obj.meta.id] = obj
                self._consider(obj)
            if obj.status.host and (known is None or known.spec.power is not obj.spec.power):
                self._again()
        elif isinstance(obj, Host):
            self._hosts[obj.meta.id] = obj
            self._again()
        elif isinstance(obj, Image):
            self._images[obj.meta.id] = obj
            self._again()
        elif isinstance(obj, Template):
            self._templates[obj.meta.id] = obj
            self._again()
        else:
            for known_ones in (self._vms, self._hosts, self._images, self._templates):
                known_ones.pop(change.id, None)
            self._again()

    def _consider(self, vm: Vm) -> None:
        if not vm.status.host:
            self._queue.add(vm.meta.id)

    def _again(self) -> None:
        """Something changed: who fits nowhere may fit now."""
        for id in self._waiting:
            self._queue.add(id)

    async def _place(self, id: str) -> float | None:
        vm = self._vms.get(id)
        if vm is None or vm.status.host:
            self._waiting.pop(id, None)
            return None
        try:
            if vm.meta.deleted is not None:
                await self._remove(vm)
                return None
            return await self._choose(vm)
        except NotFound:
            self._vms.pop(id, None)
            return None
        except Refused as error:
            if error.code != "stale":
                raise
            self._vms[id] = await self._objects.get(Vm, id)
            return 0.02

    async def _choose(self, vm: Vm) -> float | None:
        if vm.spec.power is Power.STOPPED:
            # It needs no host to be off; it gets one when it is started.
            self._waiting.pop(vm.meta.id, None)
            await self._write(vm, phase=Phase.STOPPED, reason="", observed=vm.meta.generation)
            return None
        image = self._images.get(vm.spec.image_id)
        if image is not None and image.status.phase not in (ImagePhase.READY, ImagePhase.ERROR):
            # Where it will be is where its VMs can run; an image that failed is the agent's to complain about.
            self._waiting[vm.meta.id] = None
            text = f"waits for its image {image.meta.name} ({image.status.phase})"
            await self._write(vm, phase=Phase.PENDING, reason=text)
            return RECHECK_S
        need = need_of(
            vm, arch=image.spec.arch if image is not None else "", host=image.status.host if image is not None else ""
        )
        host, table = choose(need, self._rooms(vm))
        await self._rt.faults.at("place.chosen")
        if host is None:
            self._waiting[vm.meta.id] = None
            await self._write(vm, phase=Phase.PENDING, reason=sentence(table))
            return RECHECK_S
        self._waiting.pop(vm.meta.id, None)
        await self._write(vm, host=host, epoch=vm.status.epoch + 1, reason="")
        await self._rt.faults.at("place.recorded")
        log.info("placed", vm=vm.meta.name, host=host)
        return None

    def _rooms(self, vm: Vm) -> list[Room]:
        templates = self._templates.values()
        return rooms(self._hosts.values(), self._vms.values(), templates=templates, without=vm.meta.id)

    async def _write(self, vm: Vm, **status: object) -> None:
        changed = msgspec.structs.replace(vm, status=msgspec.structs.replace(vm.status, **status))
        if changed != vm:
            self._vms[vm.meta.id] = await self._objects.update(changed)

    async def _remove(self, vm: Vm) -> None:
        """Deleted before it was anywhere: the record goes, and its tasks end with it."""
        now = self._rt.clock.now()
        writes: list[Write] = [Remove(vm)]
        for task in (await self._objects.list(Task)).items:
            if task.spec.target_id == vm.meta.id and not task.status.state.final:
                state = TaskState.DONE if task.spec.verb == "delete" else TaskState.CANCELLED
                status = msgspec.structs.replace(
                    task.status, state=state, ended=now, started=task.status.started or now
                )
                writes.append(Update(msgspec.structs.replace(task, status=status)))
        writes += [Remove(v) for v in (await self._objects.list(Volume)).items if v.spec.vm == vm.meta.id]
        await self._objects.commit(writes)
        self._vms.pop(vm.meta.id, None)
        self._waiting.pop(vm.meta.id, None)

    def _failed(self, id: str, error: Exception) -> None:
        log.error("a VM could not be placed", vm=id, exc_info=error)
