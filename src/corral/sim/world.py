"""One simulated host: machines, disks, ports. What is here survives every crash of the processes that work on it.

:class:`SimWorld` and :class:`SimDisks` are reality; :class:`SimEngine` and :class:`AgentDisks` are one agent's hands on
it, and die with it. Whatever changes reality passes :class:`Observer`, which is how the checkers see it.
"""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from corral.engine.fake import FakeEngine, FakeMachine, FakeWorld
from corral.engine.protocol import Machine, Sighting
from corral.errors import NotFound, Refused, Unavailable
from corral.model import ImageSpec
from corral.runtime import Runtime
from corral.sim.faults import Faults
from corral.sim.process import Process
from corral.storage.fake import FakeLayers
from corral.units import GIB, MIB

DIGEST = "0123456789abcdef"
"""Content of the one image there is."""


class Observer(Protocol):
    """Told of everything that is done to a host, just before it is done."""

    def creating(self, machine: Machine) -> None: ...

    def killing(self, id: str) -> None: ...

    def removing(self, id: str) -> None: ...

    def resetting(self, id: str) -> None: ...

    def pausing(self, id: str) -> None: ...

    def asking(self, id: str) -> None: ...

    def silenced(self, id: str, silent: bool) -> None: ...

    def disk_made(self, id: str) -> None: ...

    def disk_removing(self, id: str) -> None: ...


class SimWorld(FakeWorld):
    """What guests do by themselves goes on when the process that pressed their button dies."""

    def __init__(self, rt: Runtime, observer: Observer) -> None:
        super().__init__(rt)
        self._observer = observer
        self._nobody = contextvars.copy_context()

    def hang(self, id: str, hung: bool = True) -> None:
        super().hang(id, hung)
        self._observer.silenced(id, hung or self.machines[id].deaf)

    def deafen(self, id: str, deaf: bool = True) -> None:
        super().deafen(id, deaf)
        self._observer.silenced(id, deaf or self.machines[id].hung)

    def press(self, machine: FakeMachine) -> None:
        self._observer.asking(machine.machine.id)
        self._nobody.copy().run(super().press, machine)


class SimFiles(NamedTuple):
    """The image's files."""

    digest: str = DIGEST
    boot: str = "disk"
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disk: Path | None = Path("/fake/images/disk.qcow2")
    disk_format: str = "qcow2"
    virtual_size: int = GIB
    firmware: str = "bios"
    arch: str = "x86_64"
    min_memory: int = 64 * MIB
    agent: bool = True
    default_user: str = "root"
    size: int = 100 * MIB


class SimImages:
    """One image, always there. Building and fetching are other tests' business."""

    def files(self, digest: str) -> SimFiles:
        if digest != DIGEST:
            raise NotFound(f"no image {digest}")
        return SimFiles()

    def recipe(self, recipe: str, arch: str) -> str:
        return ""

    async def build(self, recipe: str, arch: str, progress: Any) -> Any:
        raise Unavailable("the simulated host builds nothing")

    async def fetch(self, spec: ImageSpec, progress: Any) -> Any:
        raise Unavailable("the simulated host fetches nothing")

    async def receive(self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int) -> Path:
        raise Unavailable("the simulated host receives nothing")

    async def accept(self, path: Path, spec: ImageSpec, progress: Any) -> Any:
        raise Unavailable("the simulated host accepts nothing")

    async def remove(self, digest: str) -> None:
        raise Unavailable("the simulated host keeps its image")

    def inventory(self) -> list[str]:
        return [DIGEST]


class SimDisks:
    """The files of VMs on the host: id → the parts that exist."""

    def __init__(self) -> None:
        self.parts: dict[str, set[str]] = {}
        self.stack = FakeLayers(Path("/fake/vms"))


class AgentDisks:
    """One agent's hands on the disks (:class:`corral.agent.ports.Disks`)."""

    def __init__(self, disks: SimDisks, process: Process, faults: Faults, observer: Observer) -> None:
        self._disks, self._process, self._faults, self._observer = disks, process, faults, observer

    async def ensure_root(self, vm_id: str, base: Any, size: int | None, *, new: bool = True) -> Path:
        if not new and "root" not in self._disks.parts.get(vm_id, ()):
            raise Refused("its disk is gone", code="failed")
        await self._ensure(vm_id, "root")
        return self._disks.stack.root(vm_id)

    async def ensure_fork(self, vm_id: str, bases: Sequence[Path], size: int | None) -> Path:
        await self._ensure(vm_id, "root")
        return self._disks.stack.fork(vm_id, bases)

    async def next_layer(self, vm_id: str, over: Path) -> tuple[Path, ...]:
        await self._reach("making a layer")
        return self._disks.stack.next(vm_id, over)

    def layers(self, vm_id: str) -> tuple[Path, ...]:
        return self._disks.stack.of(vm_id)

    async def ensure_seed(self, vm_id: str, seed: Any, *, opened: bool = False) -> Path:
        await self._ensure(vm_id, "seed")
        return Path(f"/fake/vms/{vm_id}/seed.iso")

    async def used(self, vm_id: str) -> int:
        return 10 * MIB * len(self._disks.parts.get(vm_id, ()))

    async def remove(self, vm_id: str) -> None:
        await self._reach("removing a disk")
        if vm_id in self._disks.parts:
            self._observer.disk_removing(vm_id)
            del self._disks.parts[vm_id]
            self._disks.stack.forget(vm_id)

    def inventory(self) -> list[str]:
        return sorted(self._disks.parts)

    async def _ensure(self, vm_id: str, part: str) -> None:
        await self._reach(f"making a {part} disk")
        parts = self._disks.parts.setdefault(vm_id, set())
        if part not in parts:
            parts.add(part)
            if part == "root":
                self._observer.disk_made(vm_id)

    async def _reach(self, what: str) -> None:
        self._process.check()
        await self._faults.delay()
        self._process.check()
        if self._faults.roll(self._faults.odds.disk_fails, f"{what} fails"):
            raise Unavailable(f"{what} failed: Input/output error")


class SimEngine(FakeEngine):
    """One agent's hands on the machines: observed, and failing now and then before or after the deed."""

    def __init__(self, world: SimWorld, rt: Runtime, process: Process, faults: Faults, observer: Observer) -> None:
        super().__init__(world, rt)
        self._process, self._faults, self._observer = process, faults, observer

    async def inventory(self) -> list[Sighting]:
        self._process.check()
        return await super().inventory()

    async def inspect(self, id: str) -> Sighting:
        self._process.check()
        return await super().inspect(id)

    async def create(self, machine: Machine, *, warm: bool = False) -> Sighting:
        await self._before("create")
        known = self._world.machines.get(machine.id)
        if known is None or not known.alive or known.warm:
            self._observer.creating(machine)
        await super().create(machine, warm=warm)
        await self._after("create")
        return await self.inspect(machine.id)

    async def resume(self, id: str) -> None:
        await self._before("resume")
        await super().resume(id)
        await self._after("resume")

    async def pause(self, id: str) -> None:
        await self._before("pause")
        self._observer.pausing(id)
        await super().pause(id)
        await self._after("pause")

    async def reset(self, id: str) -> None:
        await self._before("reset")
        self._observer.resetting(id)
        await super().reset(id)
        await self._after("reset")

    async def powerdown(self, id: str) -> None:
        await self._before("powerdown")
        await super().powerdown(id)
        await self._after("powerdown")

    async def kill(self, id: str) -> None:
        await self._before("kill")
        machine = self._world.machines.get(id)
        if machine is not None and machine.alive:
            self._observer.killing(id)
        await super().kill(id)
        await self._after("kill")

    async def remove(self, id: str) -> None:
        await self._before("remove")
        if id in self._world.machines:
            self._observer.removing(id)
        await super().remove(id)
        await self._after("remove")

    async def _before(self, what: str) -> None:
        self._process.check()
        await self._faults.delay()
        self._process.check()
        if self._faults.roll(self._faults.odds.engine_fails, f"the engine fails to {what}"):
            raise Unavailable(f"the hypervisor did not take {what!r}", code="unresponsive")

    async def _after(self, what: str) -> None:
        self._process.check()
        if self._faults.roll(self._faults.odds.reply_of_engine_lost, f"the engine's answer to {what} is lost"):
            raise Unavailable(f"the hypervisor's answer to {what!r} was lost", code="unresponsive")


class SimFacts(NamedTuple):
    """A host with room for a dozen small VMs."""

    arch: str = "x86_64"
    cpus: int = 4
    memory: int = 8 * GIB
    memory_available: int = 8 * GIB
    disk_free: int = 100 * GIB
    kernel: str = "6.1.0-sim"
    os: str = "Simulated"
    boot_id: str = "00000000-0000-4000-8000-000000000001"
    privileged: bool = False
    memory_stalled: float = 0.0


class SimPorts:
    """:class:`corral.agent.ports.PortProbe` of the simulated host."""

    def __init__(self, world: SimWorld) -> None:
        self._world = world

    def free(self, protocol: str, address: str, port: int) -> bool:
        taken = {(f.protocol, f.host) for m in self._world.machines.values() if m.alive for f in m.forwards}
        return (protocol, port) not in taken | self._world.foreign_ports


class _Silence:
    async def output(self) -> AsyncIterator[bytes]:
        return
        yield b""

    async def write(self, data: bytes) -> None:
        return None


class SimConsoles:
    """Serial lines on which nothing is said."""

    async def attach(self, vm_id: str, socket: Path) -> None:
        return None

    async def detach(self, vm_id: str) -> None:
        return None

    @asynccontextmanager
    async def session(self, vm_id: str) -> AsyncIterator[_Silence]:
        yield _Silence()

    def tail(self, vm_id: str, count: int) -> bytes:
        return b""

    async def follow(self, vm_id: str) -> AsyncIterator[bytes]:
        return
        yield b""

    async def close(self) -> None:
        return None
