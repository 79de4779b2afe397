"""What a daemon holds of a pretended host: the engine's protocol over a :class:`~corral.engine.fake.FakeWorld`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from corral.engine.fake.machine import FakeMachine
from corral.engine.fake.world import FakeWorld
from corral.engine.hardware import serves
from corral.engine.overlays import check_overlays, switched
from corral.engine.protocol import (
    Capabilities,
    CardStats,
    Channels,
    Drive,
    EngineEvent,
    Exit,
    Limits,
    Machine,
    MemorySight,
    Probe,
    Sighting,
    State,
    Stats,
    Template,
)
from corral.engine.qemu.command import check
from corral.errors import NotFound, Refused, Unavailable
from corral.runtime import Runtime

STATUS_DEADLINE, COMMAND_DEADLINE = 2.0, 5.0
"""What a silent hypervisor costs a caller, as with QEMU."""


class FakeEngine:
    """Implements :class:`corral.engine.protocol.Engine` over a :class:`FakeWorld`."""

    def __init__(self, world: FakeWorld, rt: Runtime) -> None:
        self._world, self._rt = world, rt
        self._pending: dict[tuple[str, str], EngineEvent] = {}
        self._woken = asyncio.Event()
        self._starting: dict[str, asyncio.Lock] = {}
        self._capabilities: Capabilities | None = None
        world.attach(self, True)

    async def probe(self, *, again: bool = False) -> Capabilities:
        if self._capabilities is None or again:
            name = self._world.accelerator
            self._capabilities = Capabilities(
                engine="Fake 1",
                arch="x86_64",
                accelerator=name,
                probes=(Probe(name=name, works=True, reason="a pretended guest ran", at=self._rt.clock.now()),),
                firmware=("bios", "uefi"),
            )
        return self._capabilities

    async def inventory(self) -> list[Sighting]:
        ids = sorted(id for id, machine in self._world.machines.items() if not machine.warm)
        return list(await asyncio.gather(*(self.inspect(id) for id in ids)))

    async def inspect(self, id: str) -> Sighting:
        machine = self._world.machines.get(id)
        if machine is None or machine.warm:
            return Sighting(id=id, state=State.ABSENT)
        return await self._look(id, machine)

    async def _look(self, id: str, machine: FakeMachine) -> Sighting:
        state = machine.state
        if machine.alive and machine.hung:
            await self._rt.clock.sleep(STATUS_DEADLINE)
            state = State.UNRESPONSIVE if machine.hung else machine.state
        return Sighting(
            id=id,
            state=state if machine.alive else State.EXITED,
            pid=machine.pid if machine.alive else None,
            started_at=machine.started_at,
            epoch=machine.machine.epoch,
            accelerator=self._world.accelerator,
            memory=machine.machine.memory,
            exit=machine.exit,
            fault="disk-full" if state is State.STALLED else "",
            forwards=machine.forwards,
            template=machine.machine.template,
        )

    async def create(self, machine: Machine, *, warm: bool = False) -> Sighting:
        check(machine)
        async with self._starting.setdefault(machine.id, asyncio.Lock()):
            known = self._world.machines.get(machine.id)
            if known is not None and known.warm:
                if not (warm and await self._take(known, machine)):
                    self._world.machines.pop(machine.id)
                known = self._world.machines.get(machine.id)
            if known is None or not known.alive:
                await self._start(machine)
        return await self.inspect(machine.id)

    async def _start(self, machine: Machine, *, warm: bool = False) -> None:
        self._world.templates.fit(machine)
        await self._rt.faults.at("engine.spawn.dir")
        await self._rt.clock.sleep(self._rt.random.uniform(*self._world.spawn))
        self._world.start(machine).warm = warm
        await self._rt.faults.at("engine.spawn.process")
        await self._rt.faults.at("engine.spawn.recorded")
        if machine.template is not None:
            self._world.templates.load(machine.template)
            await self._rt.faults.at("engine.fork.loaded")

    async def _take(self, warm: FakeMachine, wanted: Machine) -> bool:
        self._world.check_ports(wanted)
        self._world.templates.fit(wanted)
        if not serves(warm.machine, wanted) or not warm.alive or warm.hung or warm.state is not State.CREATED:
            return False
        await self._rt.faults.at("engine.take.given")
        warm.machine, warm.limits = wanted, {drive.name: drive.limits for drive in wanted.drives}
        warm.warm = False
        await self._rt.faults.at("engine.take.recorded")
        return True

    async def warm(self, machine: Machine, rehearse: Callable[[], Awaitable[None]] | None = None) -> Sighting:
        check(machine)
        if machine.template is None or any(card.forwards for card in machine.cards):
            raise Refused("only a fork without ports can be made ahead", code="unsupported")
        async with self._starting.setdefault(machine.id, asyncio.Lock()):
            known = self._world.machines.get(machine.id)
            if known is None:
                await self._start(machine, warm=True)
                if rehearse is not None:
                    await self._rehearse(self._world.machines[machine.id], rehearse)
            elif not (known.alive and known.warm):
                raise Refused(f"there is a machine {machine.id} already", code="in-use")
            return await self._look(machine.id, self._world.machines[machine.id])

    async def _rehearse(self, made: FakeMachine, rehearse: Callable[[], Awaitable[None]]) -> None:
        self._world.run(made)
        await self._rt.faults.at("engine.warm.running")
        await rehearse()
        made.state = State.CREATED

    async def pool(self) -> list[Sighting]:
        warm = [(id, machine) for id, machine in sorted(self._world.machines.items()) if machine.warm]
        return [await self._look(id, machine) for id, machine in warm]

    async def resume(self, id: str) -> None:
        machine = await self._answering(id)
        if machine.state in (State.CREATED, State.PAUSED, State.STALLED):
            self._world.run(machine)
            self._world.publish(EngineEvent(id, "state", "resume"))

    async def pause(self, id: str) -> None:
        machine = await self._answering(id)
        if machine.state is State.RUNNING:
            machine.state = State.PAUSED
            self._world.publish(EngineEvent(id, "state", "stop"))

    async def reset(self, id: str) -> None:
        self._world.reset(await self._answering(id))

    async def powerdown(self, id: str) -> None:
        self._world.press(await self._answering(id))

    async def kill(self, id: str) -> None:
        machine = self._world.machines.get(id)
        if machine is not None and machine.alive:
            self._world.end(machine, Exit(asked=True, signal=9, reason="killed"))

    async def remove(self, id: str) -> None:
        machine = self._world.machines.get(id)
        if machine is not None and machine.alive and not machine.warm:
            raise Refused(f"machine {id} still runs", code="in-use", hint="kill it first")
        self._world.machines.pop(id, None)
        self._starting.pop(id, None)

    async def link(self, id: str, card: str, up: bool) -> None:
        machine = await self._answering(id)
        if card not in machine.links:
            raise NotFound(f"machine {id} has no card {card}")
        machine.links[card] = up

    async def drives(self, id: str) -> tuple[Drive, ...]:
        return (await self._answering(id)).machine.drives

    async def hardware(self, machine: Machine) -> str:
        return self._world.templates.hardware(machine)

    async def freeze(self, id: str, template: str, overlays: Mapping[str, Drive]) -> Template:
        if (known := self._world.templates.find(template)) is not None:
            return known
        machine = await self._answering(id)
        if machine.state is not State.RUNNING:
            raise Refused(f"machine {id} is {machine.state}, not running", code="wrong-phase")
        check_overlays(machine.machine, overlays)
        await self._rt.faults.at("engine.freeze.prepared")
        pause_s = self._rt.random.uniform(*self._world.pause)
        await self._rt.clock.sleep(pause_s)
        if not machine.alive:
            raise Unavailable(f"machine {id} ended while it was frozen", code="unresponsive")
        now = self._rt.clock.now()
        made = self._world.templates.keep(template, machine.machine, overlays, pause_s=pause_s, now=now)
        machine.machine = switched(machine.machine, overlays)
        await self._rt.faults.at("engine.freeze.recorded")
        return made

    async def templates(self) -> list[Template]:
        return self._world.templates.all()

    async def discard(self, template: str) -> None:
        self._world.templates.discard(template)
        for id in [id for id, one in self._world.machines.items() if one.warm and one.machine.template == template]:
            self._world.machines.pop(id)

    async def listens(self, id: str) -> bool:
        machine = await self._answering(id)  # a guest that boots has not got that far
        up = machine.ready_at is not None and self._rt.clock.monotonic() >= machine.ready_at
        return up and not machine.agentless

    async def vcpus(self, id: str) -> tuple[int, ...]:
        machine = await self._answering(id)
        return tuple(machine.pid + 1 + number for number in range(machine.machine.cpus))

    async def stats(self, id: str) -> Stats:
        machine = await self._answering(id)
        cards = tuple(CardStats(name=card.name) for card in machine.machine.cards)
        return Stats(drives=tuple(machine.drives.values()), cards=cards)

    async def memory(self, id: str) -> MemorySight:
        machine = await self._answering(id)
        if machine.poll_s and self._world.answers(id):
            machine.said = machine.granted - machine.needed, self._rt.clock.now()
        available, at = machine.said or (None, None)
        return MemorySight(
            size=machine.machine.memory, granted=machine.granted, available=available, free=available, at=at
        )

    async def poll_memory(self, id: str, every_s: int) -> None:
        (await self._answering(id)).poll_s = every_s

    async def balloon(self, id: str, target: int) -> None:
        machine = await self._answering(id)
        if self._world.answers(id):
            machine.granted = min(machine.machine.memory, max(target, machine.needed))

    async def throttle(self, id: str, drive: str, limits: Limits) -> None:
        machine = await self._answering(id)
        if drive not in machine.limits:
            raise NotFound(f"machine {id} has no drive {drive[:40]!a}")
        machine.limits[drive] = limits

    def channels(self, id: str) -> Channels:
        run = self._world.root / id / "run"
        return Channels(serial=run / "serial.sock", guest=run / "guest.sock", qga=run / "qga.sock")

    async def events(self) -> AsyncIterator[EngineEvent]:
        while True:
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
            self._woken.clear()
            await self._woken.wait()

    async def close(self) -> None:
        self._world.attach(self, False)

    def receive(self, event: EngineEvent) -> None:
        """An event of the world reaches this daemon."""
        self._pending[event.id, event.kind] = event
        self._woken.set()

    async def _answering(self, id: str) -> FakeMachine:
        machine = self._world.machines.get(id)
        if machine is None or not machine.alive or machine.warm:
            raise Refused(f"machine {id} does not run", code="wrong-phase")
        if machine.hung:
            await self._rt.clock.sleep(COMMAND_DEADLINE)
            raise Unavailable(f"the hypervisor of {id} does not answer", code="unresponsive")
        return machine
