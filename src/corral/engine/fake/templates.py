"""Templates of a pretended host. They belong to the world, not to the daemon; see :mod:`~corral.engine.fake.world`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from corral.engine.hardware import common
from corral.engine.overlays import frozen
from corral.engine.protocol import Drive, Machine, Template
from corral.errors import NotFound, Refused


class FakeTemplates:
    """All templates of one host.

    Args:
        live: the machines that run now.
    """

    def __init__(self, place: Path, live: Callable[[], Iterable[Machine]]) -> None:
        self._place, self._live = place, live
        self._kept: dict[str, Template] = {}
        self.build = 1
        """Which hypervisor this is: another one loads no template of this one."""

    # -- faults ------------------------------------------------------------------------------------------------

    def upgrade(self) -> None:
        """The hypervisor is another build from now on."""
        self.build += 1

    def spoil(self, id: str, reason: str = "its files are damaged") -> None:
        """A template's files are damaged."""
        self._kept[id] = msgspec.structs.replace(self._kept[id], stale=reason)

    def unload(self) -> None:
        """The host was booted again: no template is in memory."""
        for id, template in self._kept.items():
            self._kept[id] = msgspec.structs.replace(template, loaded=False)

    # -- for the engine ----------------------------------------------------------------------------------------

    def hardware(self, machine: Machine) -> str:
        return hashlib.sha256(msgspec.json.encode((self.build, common(machine)), enc_hook=str)).hexdigest()

    def find(self, id: str) -> Template | None:
        """A template as it is now."""
        template = self._kept.get(id)
        if template is not None and not template.stale and template.hardware != self.hardware(template.machine):
            return msgspec.structs.replace(template, stale="the hypervisor is another build")
        return template

    def all(self) -> list[Template]:
        return [template for id in sorted(self._kept) if (template := self.find(id)) is not None]

    def fit(self, machine: Machine) -> None:
        """Raise when the machine is to be forked from a template that cannot be had."""
        if machine.template is None:
            return
        template = self.find(machine.template)
        if template is None:
            raise NotFound(f"there is no template {machine.template} here", field="template")
        if template.stale:
            raise Refused(f"template {template.id} is stale: {template.stale}", code="stale", field="template")
        if template.hardware != self.hardware(machine):
            raise Refused(f"template {template.id} has other hardware", code="unsupported", field="template")

    def load(self, id: str) -> None:
        self._kept[id] = msgspec.structs.replace(self._kept[id], loaded=True)

    def keep(self, id: str, machine: Machine, overlays: Mapping[str, Drive], *, pause_s: float, now: float) -> Template:
        """Freeze a machine."""
        place = self._place / id
        own = {one.layers[0].path: place / f"{name}.{one.layers[0].format}" for name, one in overlays.items()}
        self._kept[id] = Template(
            id=id,
            machine=frozen(machine, overlays, own),
            hardware=self.hardware(machine),
            memory=machine.memory,
            disk=1 << 20,
            made_at=now,
            digest=hashlib.sha256(id.encode()).hexdigest(),
            pause_s=pause_s,
            loaded=True,
        )
        return self._kept[id]

    def discard(self, id: str) -> None:
        users = sum(machine.template == id for machine in self._live())
        if users:
            raise Refused(f"template {id} is used by {users} running machines", code="in-use", hint="stop them first")
        self._kept.pop(id, None)
