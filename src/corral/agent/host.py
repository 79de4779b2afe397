"""The host's own record: who it is, what it has, how it makes CPUs. Written when that changes, not as a heartbeat."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import structlog

from corral.agent.ports import Facts, ReadFacts
from corral.agent.settings import Settings
from corral.engine.protocol import Capabilities, Engine
from corral.errors import NotFound, Refused
from corral.model import Accelerator, Host, HostSpec, HostStatus, Meta
from corral.runtime import Runtime
from corral.scheduler.place import DEFAULT_OVERHEAD
from corral.store.objects import Objects
from corral.units import GIB

log = structlog.get_logger("host")

DISK_STEP = GIB
"""Free disk is written down when it moved by this much: it moves all the time."""


class Registration:
    """Keeps one Host record. ``name`` is what VMs are placed by, ``id`` who the host is, for ever."""

    def __init__(
        self, objects: Objects, engine: Engine, facts: ReadFacts, rt: Runtime, settings: Settings, name: str, id: str,
        *, limits: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._limits = dict(limits)
        self._objects, self._engine, self._facts, self._rt = objects, engine, facts, rt
        self._settings, self.name, self._id = settings, name, id
        self._capabilities: Capabilities | None = None
        self.host: Host | None = None
        """The record as it was last seen."""

    @property
    def spec(self) -> HostSpec:
        """What people want of this host."""
        return self.host.spec if self.host is not None else HostSpec()

    def put(self, host: Host) -> None:
        """Take in a record: it may be ours."""
        if host.meta.id == self._id and (self.host is None or self.host.meta.revision < host.meta.revision):
            self.host = host

    @property
    def overhead(self) -> int:
        """Bytes a VM costs beyond its memory."""
        return (self._capabilities.overhead if self._capabilities else 0) or DEFAULT_OVERHEAD

    def reserved(self, facts: Facts) -> int:
        """Bytes the host keeps for itself."""
        return max(self._settings.reserve_least, facts.memory // 20)

    async def run(self) -> None:
        """Probe, register, and keep the record true."""
        while True:
            await self.refresh()
            await self._rt.clock.sleep(self._settings.facts_s)

    async def known(self) -> Host | None:
        """The record as it stands. Its name counts, whatever the machine is called now: VMs are placed by it."""
        try:
            host = await self._objects.get(Host, self._id)
        except NotFound:
            return None
        self.name = host.meta.name
        self.put(host)
        return host

    async def refresh(self, *, again: bool = False) -> Host:
        """Look, and write what is new. ``again``: try the accelerators for real, whatever is cached.

        Raises Refused ``exists`` when another host has this name.
        """
        self._capabilities = await self._engine.probe(again=again)
        status = self._status(self._facts(), self._capabilities)
        host = await self.known()
        if host is None:
            return await self._register(status)

        def mutate(current: Host) -> Host | None:
            kept = status
            if abs(current.status.disk_free - status.disk_free) < DISK_STEP:
                kept = msgspec.structs.replace(kept, disk_free=current.status.disk_free)
            if msgspec.structs.replace(kept, seen_at=current.status.seen_at) == current.status:
                return None
            return msgspec.structs.replace(current, status=kept)

        changed = await self._objects.change(Host, self._id, mutate)
        self.put(changed)
        return changed

    async def _register(self, status: HostStatus) -> Host:
        meta = Meta(id=self._id, name=self.name, created=self._rt.clock.now())
        try:
            (host,) = await self._objects.create(Host(meta=meta, status=status))
        except Refused as error:
            if error.code == "exists":
                log.error("another host is registered under this name", name=self.name)
            raise
        self.put(host)
        return host

    def _status(self, facts: Facts, able: Capabilities) -> HostStatus:
        accelerators = tuple(
            Accelerator(name=p.name, works=p.works, reason=p.reason, probed_at=p.at) for p in able.probes
        )
        return HostStatus(
            phase="ready", arch=facts.arch, cpus=facts.cpus, memory=facts.memory,
            memory_reserved=self.reserved(facts), overhead=self.overhead, disk_free=facts.disk_free,
            kernel=facts.kernel, os=facts.os, accelerator=able.accelerator, accelerators=accelerators,
            engine=able.engine, privileged=facts.privileged, limits=self._limits, boot_id=facts.boot_id,
            seen_at=self._rt.clock.now(),
        )  # fmt: skip
