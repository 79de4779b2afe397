"""Whether a VM may start now: is its image here, is there memory, is it its turn?"""

from __future__ import annotations

from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import BootFiles, Joined
from corral.agent.reconcile import Gate
from corral.agent.settings import Settings
from corral.agent.turns import Turns
from corral.errors import NotFound
from corral.model import ImagePhase, Vm
from corral.scheduler.place import Need, Room, amount, judge


class Entrance:
    """The way into running. Asked only when everything else says start."""

    def __init__(
        self, picture: Picture, joined: Joined, turns: Turns, registration: Registration, settings: Settings
    ) -> None:
        self._picture, self._joined, self._turns = picture, joined, turns
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
        gate = self._image(vm) or self._room(vm)
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

    def _room(self, vm: Vm) -> Gate | None:
        """Admission at the last moment: what runs here counts, by what it is allowed to use."""
        facts = self._joined.facts()
        others = [v for id in self._picture.alive if id != vm.meta.id and (v := self._picture.vms.get(id)) is not None]
        room = Room(
            host=self._registration.name, arch=facts.arch, cpus=facts.cpus, memory=facts.memory,
            reserved=self._registration.reserved(facts), overhead=self._registration.overhead,
            used=sum(v.spec.memory.size for v in others), vms=len(others), disk_free=facts.disk_free,
        )  # fmt: skip
        verdict = judge(Need(memory=vm.spec.memory.size, cpus=vm.spec.cpu.count), room)
        if not verdict.fits:
            return Gate(f"does not fit now: {verdict.reason}", again_s=self._settings.recheck_s)
        wanted = vm.spec.memory.size + room.overhead
        if wanted > facts.memory_available:
            return Gate(
                f"does not fit now: memory: needs {amount(wanted)}, other programs of this host leave "
                f"{amount(facts.memory_available)}",
                again_s=self._settings.recheck_s,
            )
        return None
