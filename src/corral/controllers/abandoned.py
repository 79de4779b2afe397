"""Deletes ephemeral VMs that nobody holds any more: their owner was killed, lost its connection, or never came.

Holds are keys of the store (:mod:`corral.store.holds`), so it does not matter which part died, or in which order. Times
are our own and monotonic: a restart of the daemon gives every owner its time again, and no jump of the clock takes it.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, cast

import msgspec
import structlog

from corral.controllers.follow import follow
from corral.errors import CorralError, NotFound
from corral.model import Event, EventSpec, Meta, Vm
from corral.runtime import KeyedQueue, Runtime
from corral.store.holds import PREFIX, held_by
from corral.store.objects import Create, Objects, Update
from corral.store.protocol import Change

log = structlog.get_logger("abandoned")

UNHELD_S = 5.0
"""How long a VM may be without anybody: its owner first asks for it, then holds it, and may have to connect again."""
WORKERS = 4
VMS = "/vms/"


class Abandoned:
    """The loop. Running it twice at once does no harm."""

    def __init__(self, objects: Objects, rt: Runtime) -> None:
        self._objects, self._rt = objects, rt
        self._queue = KeyedQueue(rt.clock, self._look, workers=WORKERS, on_error=self._failed)
        self._holds: dict[str, set[str]] = {}
        self._alone: dict[str, float] = {}

    async def run(self) -> None:
        """Collect until cancelled."""
        await follow("abandoned", self._queue, self._rt, self._read, self._follow)

    async def _read(self) -> int:
        holds = await self._objects.store.range(PREFIX)
        self._holds = {}
        for entry in holds.entries:
            self._holds.setdefault(held_by(entry.key), set()).add(entry.key)
        vms = await self._objects.list(Vm)
        for vm in vms.items:
            if vm.spec.ephemeral:
                self._queue.add(vm.meta.id)
        return min(holds.revision, vms.revision)

    async def _follow(self, revision: int) -> None:
        async with aclosing(cast(Any, self._objects.store.watch("/", revision + 1))) as batches:
            async for batch in batches:
                for change in batch.changes:
                    self._changed(change)

    def _changed(self, change: Change) -> None:
        if change.key.startswith(VMS):
            # Most records are of VMs that nobody holds or has to: told apart without decoding each of them.
            if change.entry is not None and b'"ephemeral":true' in change.entry.value:
                self._queue.add(change.key.removeprefix(VMS))
        elif change.key.startswith(PREFIX):
            id = held_by(change.key)
            keys = self._holds.setdefault(id, set())
            (keys.discard if change.entry is None else keys.add)(change.key)
            if not keys:
                del self._holds[id]
            self._queue.add(id)

    async def _look(self, id: str) -> float | None:
        """Seconds until a VM that is alone now is deleted, if it is still alone then."""
        if id in self._holds:
            self._alone.pop(id, None)
            return None
        try:
            vm = await self._objects.get(Vm, id)
        except NotFound:
            self._alone.pop(id, None)
            return None
        if not vm.spec.ephemeral or vm.meta.deleted is not None:
            self._alone.pop(id, None)
            return None
        now = self._rt.clock.monotonic()
        left = self._alone.setdefault(id, now) + UNHELD_S - now
        if left > 0:
            return left
        self._alone.pop(id, None)
        if (await self._objects.store.range(f"{PREFIX}{id}/")).entries:
            return None  # held since a moment ago: the watch has yet to tell, and will have it looked at again
        await self._delete(vm)
        return None

    async def _delete(self, vm: Vm) -> None:
        """As a person would with ``delete --force``, and an event that says why."""
        now, event_id = self._rt.clock.now(), self._rt.random.id()
        meta = msgspec.structs.replace(vm.meta, deleted=now, generation=vm.meta.generation + 1)
        gone = msgspec.structs.replace(vm, meta=meta, spec=msgspec.structs.replace(vm.spec, force=True))
        about = EventSpec(
            about_kind=Vm.KIND, about_id=vm.meta.id, about_name=vm.meta.name, reason="Abandoned", at=now,
            message=f"nobody has held it for {UNHELD_S:g} s: it is deleted",
        )  # fmt: skip
        event = Event(meta=Meta(id=event_id, name=event_id, project=vm.meta.project, created=now), spec=about)
        await self._rt.faults.at("abandoned.found")
        try:
            await self._objects.commit([Update(gone), Create(event)])
        except CorralError as error:
            if error.code != "stale":
                raise
            self._queue.add(vm.meta.id)  # it changed meanwhile: looked at again
            return
        await self._rt.faults.at("abandoned.recorded")
        log.info("Abandoned", vm=vm.meta.name)

    def _failed(self, id: str, error: Exception) -> None:
        log.error("an abandoned VM could not be deleted", vm=id, exc_info=error)
