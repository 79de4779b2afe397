"""The composition root of the simulation: the real service, placement, collector and agent, on a simulated host.

Two processes, ``control`` (service, placement, collector) and ``agent``. Each can die at any await and is started
again a little later with empty hands; the store, the machines and the disks stay. People reach the service through
:meth:`Cluster.ask`, and see a lost connection when it dies under them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from corral.agent.agent import Agent
from corral.agent.grants.absent import NoGovernor
from corral.agent.ports import Joined
from corral.agent.settings import Settings
from corral.api.service import Service
from corral.controllers.collect import Collector
from corral.controllers.placement import Placement
from corral.errors import Unavailable, Unknown
from corral.guest.fake import FakeConnector
from corral.host.cgroup.none import NoGroups
from corral.model import Image, ImagePhase, ImageSpec, ImageStatus, Meta
from corral.runtime import Runtime, SeededRandom, Supervisor
from corral.sim.checkers import Checkers
from corral.sim.faults import Faults, FaultyStore, Odds, ProcessFaults
from corral.sim.loop import SimClock, VirtualLoop
from corral.sim.narration import Narration
from corral.sim.process import Process, track_tasks
from corral.sim.world import (
    DIGEST,
    AgentDisks,
    SimConsoles,
    SimDisks,
    SimEngine,
    SimFacts,
    SimFiles,
    SimImages,
    SimPorts,
    SimWorld,
)  # fmt: skip
from corral.store.index import Draft
from corral.store.memory import MemoryStore
from corral.store.objects import Objects

HOST, HOST_ID = "sim", "00000000-0000-4000-8000-00000000000a"
SETTINGS = Settings(heartbeat_s=2.0, heartbeat_timeout_s=1.0, hang_patience_s=8.0, silent_patience_s=30.0)
"""Less patient than usual: what goes wrong does so for a minute."""
RESTART_S = (0.2, 3.0)
"""How long after its death a process is started again, seconds."""


class ObservedStore(MemoryStore):
    """The store itself; every transaction passes the checkers."""

    def __init__(self, rt: Runtime, checkers: Checkers) -> None:
        super().__init__(rt, history=500)
        self._checkers = checkers

    def _publish(self, draft: Draft) -> None:
        super()._publish(draft)
        for batch in draft.batches:
            self._checkers.published(batch)


class Cluster:
    """Everything of one run."""

    def __init__(self, loop: VirtualLoop, seed: int, odds: Odds) -> None:
        track_tasks(loop)
        self.narration = Narration()
        self.faults = Faults(seed, odds, self.narration)
        self.clock = SimClock(loop)
        self._seed = seed
        self._random = SeededRandom(seed)
        self.rt = self._runtime()
        self.checkers = Checkers(self.narration, HOST)
        self.store = ObservedStore(self.rt, self.checkers)
        self.objects = Objects(self.store, self.rt)
        self.world = SimWorld(self._runtime(), self.checkers)
        self.disks = SimDisks()
        self.checkers.world, self.checkers.disks = self.world, self.disks
        self.service: Service | None = None
        self._up = asyncio.Event()
        self.control: Process | None = None
        self.agent: Process | None = None
        self._keepers: list[asyncio.Task[None]] = []

    def _runtime(self, process: Process | None = None) -> Runtime:
        random = SeededRandom(self._random.below(1 << 62))
        if process is None:
            return Runtime(clock=self.clock, random=random)
        return Runtime(clock=self.clock, random=random, faults=ProcessFaults(process, self.faults))

    async def start(self) -> None:
        """Write what is there from the start, and keep both processes alive from now on."""
        await Service(self.objects, self.rt).ensure_defaults()
        files = SimFiles()
        status = ImageStatus(
            phase=ImagePhase.READY, digest=DIGEST, size=files.size, boot="disk", agent=True,
            virtual_size=files.virtual_size, min_memory=files.min_memory, host=HOST,
        )  # fmt: skip
        meta = Meta(id=self.rt.random.id(), name="sim", created=self.clock.now())
        await self.objects.create(Image(meta=meta, spec=ImageSpec(), status=status))
        loop = asyncio.get_running_loop()
        self._keepers = [
            loop.create_task(self._keep("control", self._run_control)),
            loop.create_task(self._keep("agent", self._run_agent)),
        ]

    async def stop(self) -> None:
        """End everything."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.wait(self._keepers)
        for process in (self.control, self.agent):
            if process is not None:
                process.crash()
                await process.buried()
        await self.world.close()
        await self.store.close()

    def crash(self, name: str) -> None:
        """End a process, now."""
        process = self.control if name == "control" else self.agent
        if process is not None and not process.dead.is_set():
            self.narration.tell(f"FAULT {name} is killed")
            process.crash()

    async def ask(self, work: Callable[[Service], Awaitable[Any]], name: str) -> Any:
        """One request of a person. Raises Unavailable when nobody serves, Unknown when the connection breaks."""
        try:
            async with asyncio.timeout(10.0):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable("nobody listens") from None
        process, service = self.control, self.service
        assert process is not None
        assert service is not None

        async def serve() -> Any:
            return await work(service)

        request = process.start(serve, name)
        await asyncio.wait([request])
        if request.cancelled() or process.dead.is_set():
            if not request.cancelled():
                request.exception()  # the answer never left the dead process
            raise Unknown("the connection broke")
        return request.result()

    async def _keep(self, name: str, run: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
        life = 0
        while True:
            life += 1
            process = Process(name)
            if name == "control":
                self.control = process
            else:
                self.agent = process
            self.narration.tell(f"{name} starts (life {life})")
            main = process.start(functools.partial(run, process), "main")
            dies = asyncio.get_running_loop().create_task(process.dead.wait())
            try:
                await asyncio.wait([main, dies], return_when=asyncio.FIRST_COMPLETED)
            finally:
                dies.cancel()
            if not process.dead.is_set():
                error = None if main.cancelled() else main.exception()
                self.narration.tell(f"{name} ended by itself: {error!r}")
                if not isinstance(error, Unavailable | Unknown):  # those it may end with: it is started again
                    self.checkers.breaks("I5", f"{name} ended by itself: {error!r}")
                process.crash()
            self._gone(name)
            await process.buried()
            await asyncio.sleep(self.rt.random.uniform(*RESTART_S))

    def _gone(self, name: str) -> None:
        if name == "control":
            self._up.clear()
            self.service = None

    async def _run_control(self, process: Process) -> None:
        rt = self._runtime(process)
        objects = Objects(FaultyStore(self.store, process, self.faults), rt)
        service = Service(objects, rt)
        supervisor = Supervisor(rt.clock)
        supervisor.start("service", service.run)
        supervisor.start("placement", Placement(objects, rt).run)
        supervisor.start("collector", Collector(objects, rt).run)
        self.service = service
        self._up.set()
        await process.dead.wait()

    async def _run_agent(self, process: Process) -> None:
        rt = self._runtime(process)
        objects = Objects(FaultyStore(self.store, process, self.faults), rt)
        engine = SimEngine(self.world, rt, process, self.faults, self.checkers)
        joined = Joined(
            images=SimImages(), disks=AgentDisks(self.disks, process, self.faults, self.checkers),
            connect_guest=FakeConnector(self.world), consoles=SimConsoles(), facts=SimFacts, ports=SimPorts(self.world),
            groups=NoGroups("a simulated host"), governing=NoGovernor(),
        )  # fmt: skip
        try:
            await Agent(objects, engine, joined, rt, host_name=HOST, host_id=HOST_ID, settings=SETTINGS).run()
        finally:
            self.world.attach(engine, False)
