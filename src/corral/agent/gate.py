"""Whether a VM may start now: is its image here, is there memory, is it its turn?"""

from __future__ import annotations

from typing import Protocol

from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import BootFiles, Joined
from corral.agent.reconcile import Gate
from corral.agent.settings import Settings
from corral.agent.turns import Turns
from corral.errors import NotFound
from corral.model import ImagePhase, TemplatePhase, Vm
from corral.model.vm import Memory, start_of
from corral.scheduler.place import Need, Room, Taken, amount, judge

EVICTION_S = 0.5
"""Until a template that nobody uses is gone."""


class Stock(Protocol):
    """The templates of this host, as far as they take memory (:class:`corral.agent.templates.stock.TemplateStock`)."""

    def held(self, but: str = "") -> int:
        """Bytes of memory that they take, all except one."""
        ...

    def evict(self) -> bool:
        """Let one that nobody uses go; False: there is none."""
        ...


class Entrance:
    """The way into running. Asked only when everything else says start."""

    def __init__(
        self, picture: Picture, joined: Joined, turns: Turns, registration: Registration, settings: Settings,
        stock: Stock,
    ) -> None:  # fmt: skip
        self._picture, self._joined, self._turns, self._stock = picture, joined, turns, stock
        self._registration, self._settings = registration, settings

    def files(self, vm: Vm) -> BootFiles | None:
        """The files of a VM's image, None when it is not here."""
        image = self._picture.images.get(vm.spec.image_id)
        if image is None or image.status.phase is not ImagePhase.READY:
            return None
        try:
            files: BootFiles = self._joined.images.files(image.status.digest)
        except NotFound:
            return None
        return files

    def ask(self, vm: Vm) -> Gate:
        """Open, or why not. An open gate holds one of the turns."""
        gate = self._image(vm) or self._template(vm) or self._room(vm)
        if gate is not None:
            self._turns.give(vm.meta.id)
            return gate
        files = self.files(vm)
        assert files is not None
        cap = self._settings.start_cap_s if files.agent else self._settings.start_cap_blind_s
        if not self._turns.take(vm.meta.id, cap):
            return Gate("waits for its turn to start", again_s=self._settings.recheck_s)
        # Counted from now on: the next one that asks must not be let in on the same memory.
        self._picture.alive.add(vm.meta.id)
        return Gate()

    def _image(self, vm: Vm) -> Gate | None:
        image = self._picture.images.get(vm.spec.image_id)
        if image is None:
            return Gate(f"its image {vm.spec.image} is gone", error=True)
        if image.status.phase is ImagePhase.ERROR:
            return Gate(f"its image {vm.spec.image} failed: {image.status.reason}", error=True)
        if image.status.phase is not ImagePhase.READY:
            return Gate(f"waits for its image {vm.spec.image} ({image.status.phase})")
        files = self.files(vm)
        if files is None:
            return Gate(f"the files of its image {vm.spec.image} are missing on this host", error=True)
        arch = self._joined.facts().arch
        if files.arch != arch:
            return Gate(f"its image is for {files.arch}, this host is {arch}", error=True)
        return None

    def _template(self, vm: Vm) -> Gate | None:
        """A fork of a running VM waits until that VM is frozen, and never boots instead."""
        if not vm.spec.template or start_of(vm).done:
            return None
        template = self._picture.templates.get(vm.spec.template)
        if template is None:
            return Gate("what it was to be forked from is gone", error=True)
        if template.status.phase in (TemplatePhase.ERROR, TemplatePhase.STALE, TemplatePhase.LOST):
            return Gate(f"what it was to be forked from failed: {template.status.reason}", error=True)
        if template.status.phase is not TemplatePhase.READY:
            return Gate("waits until the VM that it is forked from is frozen")
        return None

    def _room(self, vm: Vm) -> Gate | None:
        why = self.lacks(vm.spec.memory, vm.spec.cpu.count, but=vm.meta.id)
        if not why:
            return None
        if self._stock.evict():
            return Gate("waits for the memory of a template that nobody uses", again_s=EVICTION_S)
        return Gate(f"does not fit now: {why}", again_s=self._settings.recheck_s)

    def lacks(self, memory: Memory, cpus: int, *, but: str = "") -> str:
        """Admission at the last moment: what runs here counts, by what it is allowed to use. Empty: it fits.

        ``but``: the VM or template that asks.
        """
        facts = self._joined.facts()
        others = [v for id in self._picture.alive if id != but and (v := self._picture.vms.get(id)) is not None]
        spec, taken = self._registration.spec, Taken()
        for other in others:
            taken = taken.plus(other.spec.memory)
        room = Room(
            host=self._registration.name, arch=facts.arch, cpus=facts.cpus, memory=facts.memory,
            reserved=self._registration.reserved(facts), overhead=self._registration.overhead,
            used=taken.memory, promised=taken.reserve, vms=taken.vms, disk_free=facts.disk_free,
            templates=self._stock.held(but), budget=spec.memory_budget, overcommit=spec.memory_overcommit,
        )  # fmt: skip
        verdict = judge(Need(memory=memory.size, reserve=memory.reserve or 0, cpus=cpus), room)
        if not verdict.fits:
            return verdict.reason
        # Where more is given than there is, nobody can count on all of it at once.
        sure = max(memory.reserve or 0, int(memory.size / spec.memory_overcommit))
        wanted = sure + room.overhead
        if wanted > facts.memory_available:
            left = amount(facts.memory_available)
            return f"memory: needs {amount(wanted)}, other programs of this host leave {left}"
        return ""
