"""One pretended host with a real agent and placement, in virtual time: what the agent's tests stand on."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from corral.agent.agent import Agent
from corral.agent.grants.absent import NoGovernor
from corral.agent.ports import Governing, Groups, Joined
from corral.agent.settings import Settings
from corral.controllers.placement import Placement
from corral.engine.fake import FakeEngine, FakeWorld
from corral.errors import NotFound, Unavailable
from corral.guest.fake import FakeConnector
from corral.host.cgroup.none import NoGroups
from corral.model import (
    Event,
    EventSpec,
    Image,
    ImagePhase,
    ImageSpec,
    ImageStatus,
    Meta,
    Nic,
    Power,
    Resource,
    Task,
    TaskSpec,
    Vm,
    VmSpec,
    Volume,
    VolumeSpec,
)
from corral.runtime import Runtime, SeededRandom
from corral.sim.loop import SimClock, VirtualLoop, simulate
from corral.storage.fake import FakeLayers
from corral.store.memory import MemoryStore
from corral.store.objects import Create, Objects, Update, Write
from corral.units import GIB, MIB

DIGEST = "d" * 64
OVERHEAD = 50 * MIB
"""What a pretended process takes beyond its guest's memory."""


def vm_id(name: str = "web") -> str:
    """The id that the stage gives to a VM of this name."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))


def mac_of(name: str) -> str:
    return "52:54:00:" + ":".join(vm_id(name)[n : n + 2] for n in (0, 2, 4))


class Files(NamedTuple):
    digest: str = DIGEST
    boot: str = "disk"
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disk: Path | None = Path("/fake/disk.qcow2")
    disk_format: str = "qcow2"
    virtual_size: int = GIB
    firmware: str = "bios"
    arch: str = "x86_64"
    min_memory: int = 0
    agent: bool = True
    default_user: str = "root"
    size: int = 1000


class FakeImages:
    """``stock``: what is there. ``work``: what building and fetching do, before they succeed. ``today``: the recipe;
    ``made``: the digest of what comes out.
    """

    def __init__(self) -> None:
        self.stock: dict[str, Files] = {DIGEST: Files()}
        self.work: Callable[[Any], Awaitable[None]] | None = None
        self.received: dict[str, bytes] = {}
        self.today, self.made = "", "b" * 64

    def files(self, digest: str) -> Files:
        if digest not in self.stock:
            raise NotFound(f"no image {digest}")
        return self.stock[digest]

    async def _make(self, progress: Any) -> Files:
        if self.work is not None:
            await self.work(progress)
        self.stock[self.made] = Files(digest=self.made)
        return self.stock[self.made]

    def recipe(self, recipe: str, arch: str) -> str:
        return self.today

    async def build(self, recipe: str, arch: str, progress: Any) -> Files:
        return await self._make(progress)

    async def fetch(self, spec: ImageSpec, progress: Any) -> Files:
        return await self._make(progress)

    async def receive(self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int) -> Path:
        self.received[upload_id] = b"".join([chunk async for chunk in chunks])
        return Path(f"/fake/{upload_id}")

    async def accept(self, path: Path, spec: ImageSpec, progress: Any) -> Files:
        return await self._make(progress)

    async def remove(self, digest: str) -> None:
        self.stock.pop(digest, None)

    def inventory(self) -> list[str]:
        return sorted(self.stock)


class FakeDisks:
    def __init__(self) -> None:
        self.parts: dict[str, set[str]] = {}
        self.stack = FakeLayers(Path("/fake"))
        self.broken = False

    async def _ensure(self, vm_id: str, part: str) -> Path:
        if self.broken:
            raise Unavailable("no space left on the device")
        self.parts.setdefault(vm_id, set()).add(part)
        return Path(f"/fake/{vm_id}/{part}")

    async def ensure_root(self, vm_id: str, base: Any, size: int | None, *, new: bool = True) -> Path:
        await self._ensure(vm_id, "root.qcow2")
        return self.stack.root(vm_id)

    async def ensure_fork(self, vm_id: str, bases: Sequence[Path], size: int | None) -> Path:
        await self._ensure(vm_id, "root.qcow2")
        return self.stack.fork(vm_id, bases)

    async def next_layer(self, vm_id: str, over: Path) -> tuple[Path, ...]:
        await self._ensure(vm_id, "layer")
        return self.stack.next(vm_id, over)

    def layers(self, vm_id: str) -> tuple[Path, ...]:
        return self.stack.of(vm_id)

    async def ensure_seed(self, vm_id: str, seed: Any, *, opened: bool = False) -> Path:
        return await self._ensure(vm_id, "seed.iso")

    async def used(self, vm_id: str) -> int:
        return 1000 * len(self.parts.get(vm_id, ()))

    async def remove(self, vm_id: str) -> None:
        self.parts.pop(vm_id, None)
        self.stack.forget(vm_id)

    def inventory(self) -> list[str]:
        return sorted(self.parts)


class FakeConsoles:
    def __init__(self) -> None:
        self.attached: set[str] = set()
        self.said = b"login: "

    async def attach(self, vm_id: str, socket: Path) -> None:
        self.attached.add(vm_id)

    async def detach(self, vm_id: str) -> None:
        self.attached.discard(vm_id)

    @asynccontextmanager
    async def session(self, vm_id: str) -> AsyncIterator[Any]:
        raise NotImplementedError
        yield

    def tail(self, vm_id: str, count: int) -> bytes:
        return self.said[-count:]

    async def follow(self, vm_id: str) -> AsyncIterator[bytes]:
        yield b"login: "

    async def close(self) -> None:
        self.attached.clear()


class FakeFacts(NamedTuple):
    arch: str = "x86_64"
    cpus: int = 2
    memory: int = 8 * GIB
    memory_available: int = 8 * GIB
    disk_free: int = 100 * GIB
    kernel: str = "6.1"
    os: str = "Test"
    boot_id: str = "boot-1"
    privileged: bool = False
    memory_stalled: float = 0.0


class FakePorts:
    def __init__(self, world: FakeWorld) -> None:
        self.world = world

    def free(self, protocol: str, address: str, port: int) -> bool:
        taken = {(f.protocol, f.host) for m in self.world.machines.values() if m.alive for f in m.forwards}
        return (protocol, port) not in taken | self.world.foreign_ports


class Died(BaseException):
    """The agent's process ended at a fault point."""


class Points:
    """Fault points that are counted, and at one of which the agent dies."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.die_at = ""
        self.died: asyncio.Event | None = None

    async def at(self, point: str) -> None:
        if self.died is not None and self.died.is_set():
            raise asyncio.CancelledError  # whoever is dead does nothing more, also while it is cancelled
        self.seen.append(point)
        if point == self.die_at and self.died is not None:
            self.die_at = ""
            self.died.set()
            await asyncio.Event().wait()  # never passes; the whole agent is cancelled from outside


class Stage:
    """One host. ``start`` and ``stop`` are the daemon's; the world survives both."""

    def __init__(self, loop: VirtualLoop, settings: Settings | None = None, **world: Any) -> None:
        self.points = Points()
        self.rt = Runtime(clock=SimClock(loop), random=SeededRandom(1), faults=self.points)
        self.store = MemoryStore(self.rt)
        self.objects = Objects(self.store, self.rt)
        self.world = FakeWorld(self.rt, **world)
        self.images, self.disks, self.consoles = FakeImages(), FakeDisks(), FakeConsoles()
        self.facts = FakeFacts()
        self.governing: Governing = NoGovernor()
        self.groups: Groups = NoGroups("a test")
        self.name = "here"
        self.settings = settings or Settings()
        self._running: list[asyncio.Task[None]] = []

    async def held(self, pids: Sequence[int]) -> list[int | None]:
        """What each process holds: as if they were real."""
        return [100 * MIB for _ in pids]

    async def own(self, pids: Sequence[int]) -> list[int | None]:
        """What each process has: what its guest needs, and QEMU's own."""
        machines = {machine.pid: machine for machine in self.world.machines.values()}
        return [OVERHEAD + machines[pid].needed if pid in machines else None for pid in pids]

    async def start(self) -> Agent:
        self.engine = FakeEngine(self.world, self.rt)
        joined = Joined(
            self.images,
            self.disks,
            FakeConnector(self.world),
            self.consoles,
            lambda: self.facts,
            FakePorts(self.world),
            self.groups,
            self.governing,
            self.held,
            own=self.own,
        )
        self.agent = Agent(
            self.objects, self.engine, joined, self.rt,
            host_name=self.name, host_id="host-1", ssh_key="ssh-ed25519 AAAA corral", settings=self.settings,
        )  # fmt: skip
        placement = Placement(self.objects, self.rt)
        self._running = [asyncio.create_task(self.agent.run()), asyncio.create_task(placement.run())]
        await asyncio.sleep(0.5)
        return self.agent

    async def stop(self) -> None:
        for task in self._running:
            task.cancel()
        results = await asyncio.gather(*self._running, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results), results
        await self.engine.close()
        self.points.died = None

    async def close(self) -> None:
        await self.stop()
        await self.world.close()
        await self.store.close()

    async def image(self, name: str = "img", **fields: Any) -> Image:
        status = ImageStatus(phase=ImagePhase.READY, digest=DIGEST, agent=True, host="here")
        spec = fields.pop("spec", ImageSpec(source="build", recipe="micro"))
        meta = Meta(id=f"image-{name}", name=name, created=self.rt.clock.now())
        image = Image(meta=meta, spec=spec, status=msgspec.structs.replace(status, **fields))
        return (await self.objects.create(image))[0]

    async def launch(self, name: str = "web", *, deadline_s: float = 120.0, **spec: Any) -> Vm:
        """A VM with its launch task, as the API writes them."""
        now = self.rt.clock.now()
        vm = Vm(
            meta=Meta(id=vm_id(name), name=name, created=now),
            spec=VmSpec(**{"image": "img", "image_id": "image-img", "nics": (Nic(mac=mac_of(name)),), **spec}),
        )
        volume = Volume(
            meta=Meta(id=f"volume-{name}", name=f"{name}-root", created=now),
            spec=VolumeSpec(size=GIB, image_id="image-img", vm=vm.meta.id),
        )
        written = await self.objects.commit([Create(vm), Create(volume), Create(self.task("launch", vm, deadline_s))])
        assert isinstance(written[0], Vm)
        return written[0]

    def task(self, verb: str, target: Resource, deadline_s: float = 120.0) -> Task:
        id = f"task-{verb}-{target.meta.name}-{target.meta.generation}"
        return Task(
            meta=Meta(id=id, name=id, created=self.rt.clock.now()),
            spec=TaskSpec(
                verb=verb, target_kind=target.KIND, target_id=target.meta.id, target_name=target.meta.name,
                generation=target.meta.generation, deadline_s=deadline_s,
            ),
        )  # fmt: skip

    async def ask(self, verb: str, name: str = "web", *, deadline_s: float = 120.0, **spec: Any) -> str:
        """Change a VM's wish with a task beside it; the task's id."""
        while True:
            vm = await self.objects.get(Vm, vm_id(name))
            if verb == "delete":
                meta = msgspec.structs.replace(vm.meta, deleted=self.rt.clock.now(), generation=vm.meta.generation + 1)
            else:
                meta = msgspec.structs.replace(vm.meta, generation=vm.meta.generation + 1)
            wish = dict(spec)
            power = {"start": Power.RUNNING, "stop": Power.STOPPED, "pause": Power.PAUSED, "resume": Power.RUNNING}
            if verb in power:
                wish["power"] = power[verb]
            if verb == "restart":
                wish["boots"] = vm.spec.boots + 1
            if verb == "reset":
                wish["resets"] = vm.spec.resets + 1
            changed = msgspec.structs.replace(vm, meta=meta, spec=msgspec.structs.replace(vm.spec, **wish))
            task = self.task(verb, changed, deadline_s)
            writes: list[Write] = [Update(changed), Create(task)]
            try:
                await self.objects.commit(writes)
            except Exception as error:
                if getattr(error, "code", "") != "stale":
                    raise
                continue
            return task.meta.id

    async def vm(self, name: str = "web") -> Vm:
        return await self.objects.get(Vm, vm_id(name))

    async def until(self, what: str, test: Callable[[Vm], bool], name: str = "web", limit: float = 200.0) -> Vm:
        """Wait until the VM's record is so."""
        end = asyncio.get_running_loop().time() + limit
        while True:
            vm = await self.vm(name)
            if test(vm):
                return vm
            assert asyncio.get_running_loop().time() < end, f"never {what}: {vm.status} {vm.spec.power}"
            await asyncio.sleep(0.1)

    async def phase(self, phase: str, name: str = "web", limit: float = 200.0) -> Vm:
        return await self.until(phase, lambda vm: vm.status.phase == phase, name, limit)

    async def done(self, task_id: str, limit: float = 400.0) -> Task:
        """Wait until a task has ended."""
        end = asyncio.get_running_loop().time() + limit
        while True:
            task = await self.objects.get(Task, task_id)
            if task.status.state.final:
                return task
            assert asyncio.get_running_loop().time() < end, f"never ended: {task}"
            await asyncio.sleep(0.1)

    async def gone(self, name: str = "web", limit: float = 100.0) -> None:
        end = asyncio.get_running_loop().time() + limit
        while True:
            try:
                vm = await self.vm(name)
            except NotFound:
                return
            assert asyncio.get_running_loop().time() < end, f"never gone: {vm}"
            await asyncio.sleep(0.1)

    async def events(self) -> list[str]:
        await asyncio.sleep(0.1)
        return [e.spec.reason for e in sorted((await self.objects.list(Event)).items, key=lambda e: e.meta.revision)]

    async def told(self, reason: str) -> EventSpec:
        """The last event of a kind."""
        await asyncio.sleep(0.1)
        found = [e for e in (await self.objects.list(Event)).items if e.spec.reason == reason]
        assert found, f"no event {reason}"
        return max(found, key=lambda e: e.meta.revision).spec


def on_stage(test: Callable[[Stage], Coroutine[Any, Any, None]], *, started: bool = True, **options: Any) -> None:
    """Run a test on a stage with one image, in virtual time."""

    async def main(loop: VirtualLoop) -> None:
        stage = Stage(loop, **options)
        await stage.image()
        if started:
            await stage.start()
        try:
            await test(stage)
        finally:
            await stage.close()

    simulate(main)


__all__ = ["DIGEST", "GIB", "MIB", "Files", "Stage", "mac_of", "on_stage", "vm_id"]
