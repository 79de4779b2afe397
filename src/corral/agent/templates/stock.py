"""The templates there are, for whoever starts VMs: which one fits, what they hold, which may go, which is missing.

Fed by :mod:`corral.agent.templates.jobs`. Asked on the way of every launch: nothing here waits for a template.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from corral.agent.host import Registration
from corral.agent.machine import machine_of, wants_root, wants_seed
from corral.agent.picture import Picture
from corral.agent.ports import BootFiles, Joined
from corral.agent.settings import Settings
from corral.agent.templates.budget import Budget, least_recent, make_room
from corral.agent.templates.choose import Choice, alike, choose, must_boot
from corral.engine.protocol import Engine
from corral.engine.protocol import Template as Frozen
from corral.errors import NotFound, Refused
from corral.model import Meta, Template, TemplatePhase, TemplateSpec, TemplateStatus, Vm
from corral.model.template import default_name, memory_of, serving
from corral.model.vm import start_of
from corral.runtime import Runtime
from corral.store.objects import Objects

log = structlog.get_logger("templates")

_SOME_ROOT, _SOME_SEED = (Path("/root.qcow2"),), Path("/seed.iso")
"""Paths are no hardware: any will do to ask for the digest of a machine."""


class Pool(Protocol):
    """Forks that are made ahead (:class:`corral.agent.templates.pool.WarmPool`)."""

    def held(self) -> int: ...

    def press(self) -> bool: ...

    def count(self, template_id: str) -> int: ...


class TemplateStock:
    """One per host. ``poke``: have a template handled soon. ``pool``: what is made of them ahead."""

    def __init__(
        self, objects: Objects, engine: Engine, joined: Joined, rt: Runtime, settings: Settings,
        *, picture: Picture, registration: Registration, poke: Callable[[str], None], pool: Callable[[], Pool],
    ) -> None:  # fmt: skip
        self._pool = pool
        self._objects, self._engine, self._joined, self._rt = objects, engine, joined, rt
        self._settings, self._picture, self._registration, self._poke = settings, picture, registration, poke
        self._frozen: dict[str, Frozen] = {}
        self._used: dict[str, float] = {}  # forks made since it was last written down
        self.leaving: set[str] = set()
        """Those that go to make room for a VM."""
        self.known = asyncio.Event()
        """What is on the host has been looked at once."""

    # What is on the host

    def fill(self, found: Iterable[Frozen]) -> None:
        """All that is there now."""
        self._frozen = {frozen.id: frozen for frozen in found}
        self.known.set()

    def put(self, frozen: Frozen) -> None:
        self._frozen[frozen.id] = frozen

    def drop(self, id: str) -> None:
        """It is gone."""
        self._frozen.pop(id, None)
        self.leaving.discard(id)

    def find(self, id: str) -> Frozen | None:
        return self._frozen.get(id)

    def usable(self, id: str) -> Frozen:
        """One that can be forked from. Raises Refused ``stale``."""
        frozen = self._frozen.get(id)
        if frozen is None or frozen.stale:
            why = frozen.stale if frozen is not None else "its files are gone"
            raise Refused(f"it cannot be used: {why}", code="stale", field="template")
        return frozen

    # What launches ask

    async def choice(self, vm: Vm, files: BootFiles) -> Choice:
        """The template that a VM is forked from now, or why it boots. Raises Refused when it must not boot."""
        if vm.spec.template and not start_of(vm).done:
            template = self._picture.templates.get(vm.spec.template)
            if template is None or template.status.phase is not TemplatePhase.READY:
                raise Refused("what it was to be forked from is gone", code="failed", field="template")
            return Choice(template)
        why = must_boot(vm, files)
        if why:
            return Choice(why=why)
        root, seed = _SOME_ROOT if wants_root(files) else (), _SOME_SEED if wants_seed(files) else None
        hardware = await self._engine.hardware(machine_of(vm, files, root=root, seed=seed, ports=()))
        return choose(vm, files, hardware, self.here())

    def used(self, id: str) -> None:
        """A VM is forked from it."""
        self._used[id] = self._rt.clock.now()

    def suspect(self, id: str) -> None:
        """A fork of it was refused: it is looked at again."""
        self._poke(id)

    def count(self, id: str) -> None:
        """Another number of forks of it waits: it is written down soon."""
        self._poke(id)

    def last_use(self, id: str) -> float | None:
        """When it was forked from, if that was not asked for yet."""
        return self._used.pop(id, None)

    def here(self) -> list[Template]:
        """The records of this host's templates."""
        name = self._registration.name
        return [one for one in self._picture.templates.values() if one.status.host in ("", name)]

    # What they take

    def held(self, but: str = "") -> int:
        """Bytes of memory that they take now, all except one, and the forks that are made of them ahead."""
        return sum(memory_of(one) for one in self.here() if one.meta.id != but) + self._pool().held()

    def left(self) -> int:
        """Bytes of memory that the platform's own may still take, as far as no fork made ahead has them."""
        mine = (one for one in self.here() if one.spec.auto and not one.spec.source)
        return max(0, self._budget().memory - sum(memory_of(one) for one in mine))

    def warm(self, id: str) -> int:
        """Forks of it that are made ahead."""
        return self._pool().count(id)

    def evict(self) -> bool:
        """Let go what nobody uses, to make room for a VM: forks made ahead, then a template; False: there is none."""
        if self._pool().press():
            return True
        going = [one.meta.id for one in least_recent(self.here())]
        if not going:
            return False
        if self.leaving.isdisjoint(going):
            self.leaving.add(going[0])
            self._poke(going[0])
        return True

    async def want(self, vm: Vm) -> None:
        """A VM booted because there was no template for it: ask for one, if that is wanted and fits the budget."""
        spec, here = serving(vm.spec), self.here()
        mine = (one for one in here if one.meta.project == vm.meta.project and not one.spec.source)
        if not self._settings.templates or any(alike(one.spec, spec) for one in mine):
            return
        going = make_room(spec, here, self._budget())
        if going is None:
            log.info("no template is made: what templates may take is spent", image=spec.image, memory=spec.memory)
            return
        for one in going:
            await self.retire(one)
        await self._create(vm, spec)

    def _budget(self) -> Budget:
        facts, settings = self._joined.facts(), self._settings
        disk = facts.disk_free + sum(one.status.disk for one in self.here())
        return Budget(int(settings.template_memory * facts.memory), int(settings.template_disk * disk))

    async def adopt(self, frozen: Frozen) -> None:
        """Have a record of one that is on this host and that no record tells of: so it can be seen, and can go."""
        now, cards = self._rt.clock.now(), len(frozen.machine.cards)
        spec = TemplateSpec(image="unknown", cpus=frozen.machine.cpus, memory=frozen.memory, cards=cards, auto=True)
        status = TemplateStatus(
            phase=TemplatePhase.LOST, host=self._registration.name,
            reason="no record told of it, so nobody knows whose it is",
            hardware=frozen.hardware, memory=frozen.memory, disk=frozen.disk, made_at=frozen.made_at,
        )  # fmt: skip
        meta = Meta(id=frozen.id, name=f"lost-{frozen.id}", project="default", created=now)
        self._picture.exhume(frozen.id)
        try:
            (made,) = await self._objects.create(Template(meta=meta, spec=spec, status=status))
        except Refused as error:
            if error.code != "exists":
                raise
            return  # there is a record, and it will be heard of
        self._picture.put(made)

    async def _create(self, vm: Vm, spec: TemplateSpec) -> None:
        name = default_name(spec)
        for last, attempt in enumerate((name, f"{name[:50]}-{self._rt.random.token(4).hex()}")):
            id, now = self._rt.random.id(), self._rt.clock.now()
            meta = Meta(id=id, name=attempt, project=vm.meta.project, created=now)
            try:
                await self._objects.create(Template(meta=meta, spec=spec))
                return
            except Refused as error:
                if error.code != "exists" or last:
                    raise

    # Their records

    async def set(self, id: str, **status: Any) -> None:
        """Change a template's status; what is gone stays gone, what is so already is not written."""

        def mutate(current: Template) -> Template:
            changed: TemplateStatus = msgspec.structs.replace(current.status, **status)
            return msgspec.structs.replace(current, status=changed)

        known = self._picture.templates.get(id)
        if known is not None and mutate(known) == known:
            return
        await self._change(id, mutate)

    async def retire(self, template: Template) -> None:
        """Ask for the end of one."""

        def doomed(now: Template) -> Template | None:
            if now.meta.deleted is not None:
                return None
            return msgspec.structs.replace(now, meta=msgspec.structs.replace(now.meta, deleted=self._rt.clock.now()))

        await self._change(template.meta.id, doomed)
        self._poke(template.meta.id)

    async def _change(self, id: str, mutate: Callable[[Template], Template | None]) -> None:
        try:
            written: Template = await self._objects.change(Template, id, mutate)
            self._picture.put(written)
        except NotFound:
            self._picture.bury(id)
