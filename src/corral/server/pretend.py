"""A host that exists only as data, for ``CORRAL_ENGINE=fake``: everything above the hypervisor is real.

Tests and benchmarks of the API, the store and the controllers run on it without waiting for guests. Its machines end
with the daemon.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from corral.agent.forwards import SocketProbe
from corral.agent.grants.absent import NoGovernor
from corral.agent.ports import Joined, Progress
from corral.engine.fake import FakeEngine, FakeWorld
from corral.errors import NotFound, Refused
from corral.guest.fake import FakeConnector
from corral.model import ImageSpec
from corral.runtime import Runtime
from corral.server.home import Home
from corral.server.world import World
from corral.storage.fake import FakeLayers
from corral.units import GIB, MIB

MEMORY = 1 << 50
"""Bytes of RAM that the host pretends to have: admission must not be what a benchmark measures."""
BOOT_S = (0.05, 0.2)


class PretendFiles(NamedTuple):
    """An image of which nobody reads a byte."""

    digest: str
    name: str
    boot: str = "disk"
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disk: Path | None = Path("/nowhere/disk.qcow2")
    disk_format: str = "qcow2"
    virtual_size: int = GIB
    firmware: str = "bios"
    arch: str = "x86_64"
    min_memory: int = 64 * MIB
    agent: bool = True
    default_user: str = "root"
    size: int = MIB


class PretendImages:
    """Any image is there at once. The digest says what it is, so that a restarted daemon knows it again."""

    def files(self, digest: str) -> PretendFiles:
        if len(digest) != 64:
            raise NotFound(f"there is no image {digest[:80]!a} here")
        disk = None if digest.startswith("00") else Path("/nowhere/disk.qcow2")
        return PretendFiles(digest, digest[:12], disk=disk, virtual_size=GIB if disk else 0)

    def recipe(self, recipe: str, arch: str) -> str:
        return ""

    async def build(self, recipe: str, arch: str, progress: Progress) -> PretendFiles:
        if recipe not in ("micro", "debian"):
            raise Refused(f"there is no recipe {recipe[:60]!a}", code="unsupported", hint="recipes: micro, debian")
        progress("pretending", 1, 1)
        digest = hashlib.sha256(f"{recipe} {arch}".encode()).hexdigest()
        return self.files(f"00{digest[2:]}" if recipe == "micro" else f"11{digest[2:]}")

    async def fetch(self, spec: ImageSpec, progress: Progress) -> PretendFiles:
        progress("pretending", 1, 1)
        return self.files("11" + hashlib.sha256(f"{spec.recipe} {spec.url}".encode()).hexdigest()[2:])

    async def receive(self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int) -> Path:
        total = 0
        async for chunk in chunks:
            total += len(chunk)
            if total > limit:
                raise Refused("the upload is too large", code="too-large")
        return Path("/nowhere") / upload_id

    async def accept(self, path: Path, spec: ImageSpec, progress: Progress) -> PretendFiles:
        return self.files("11" + hashlib.sha256(str(path).encode()).hexdigest()[2:])

    async def remove(self, digest: str) -> None:
        """Nothing is there."""

    def inventory(self) -> list[str]:
        return []


class PretendDisks:
    """Disks without bytes."""

    def __init__(self) -> None:
        self._layers = FakeLayers(Path("/nowhere"))

    async def ensure_root(self, vm_id: str, base: Any, size: int | None, *, new: bool = True) -> Path:
        return self._layers.root(vm_id)

    async def ensure_fork(self, vm_id: str, bases: Sequence[Path], size: int | None) -> Path:
        return self._layers.fork(vm_id, bases)

    async def next_layer(self, vm_id: str, over: Path) -> tuple[Path, ...]:
        return self._layers.next(vm_id, over)

    def layers(self, vm_id: str) -> tuple[Path, ...]:
        return self._layers.of(vm_id)

    async def ensure_seed(self, vm_id: str, seed: Any, *, opened: bool = False) -> Path:
        return Path("/nowhere") / vm_id / "seed.iso"

    async def used(self, vm_id: str) -> int:
        return 0

    async def remove(self, vm_id: str) -> None:
        self._layers.forget(vm_id)

    def inventory(self) -> list[str]:
        return []


class PretendSession:
    """A console that repeats what is typed."""

    def __init__(self, banner: bytes) -> None:
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue(64)
        self._pieces.put_nowait(banner)

    async def output(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._pieces.get()

    async def write(self, data: bytes) -> None:
        await self._pieces.put(data)


class PretendConsoles:
    """Serial lines that say one thing."""

    def __init__(self) -> None:
        self._attached: set[str] = set()

    async def attach(self, vm_id: str, socket: Path) -> None:
        self._attached.add(vm_id)

    async def detach(self, vm_id: str) -> None:
        self._attached.discard(vm_id)

    @asynccontextmanager
    async def session(self, vm_id: str) -> AsyncIterator[PretendSession]:
        if vm_id not in self._attached:
            raise Refused("the VM has no open serial line", code="wrong-phase", hint="start it first")
        yield PretendSession(self.tail(vm_id, 1 << 16))

    def tail(self, vm_id: str, count: int) -> bytes:
        return b"a pretended guest\r\n"[-count:] if count and vm_id in self._attached else b""

    async def follow(self, vm_id: str) -> AsyncIterator[bytes]:
        yield self.tail(vm_id, 1 << 16)

    async def close(self) -> None:
        self._attached.clear()


def pretended(home: Home, rt: Runtime) -> World:
    """The whole host."""
    from corral.host.cgroup.none import NoGroups
    from corral.host.facts import facts

    world = FakeWorld(rt, root=home.vms, boot=BOOT_S, powerdown=(0.02, 0.1), spawn=(0.0, 0.001))
    joined = Joined(
        images=PretendImages(), disks=PretendDisks(), connect_guest=FakeConnector(world), consoles=PretendConsoles(),
        facts=lambda: facts(home.state)._replace(memory=MEMORY, memory_available=MEMORY, arch="x86_64", cpus=32),
        ports=SocketProbe(), groups=NoGroups("a pretended host"), governing=NoGovernor(),
    )  # fmt: skip
    catalogue = [{"name": name, "source": "build", "description": "pretended"} for name in ("debian", "micro")]
    return World(FakeEngine(world, rt), joined, catalogue)
