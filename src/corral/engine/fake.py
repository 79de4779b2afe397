"""An engine without a hypervisor, for the simulator and for tests that need many machines: same behaviour, virtual
time.

:class:`FakeWorld` is one host's reality (machines, ports, guests); it survives daemons. :class:`FakeEngine` is what a
daemon holds: drop it and make another over the same world, and the daemon was restarted. A machine boots, obeys the
power button and dies in random but repeatable times; the world's other methods are the faults that tests play. What
answers inside a machine is :mod:`corral.guest.fake`, joined by :meth:`FakeWorld.guest_at`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec

from corral.engine.fake_templates import FakeTemplates
from corral.engine.hardware import serves
from corral.engine.overlays import check_overlays, switched
from corral.engine.protocol import (
    Capabilities,
    CardStats,
    Channels,
    Drive,
    DriveStats,
    EngineEvent,
    Exit,
    HostForward,
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
SECTOR = 512
"""Bytes that a boot reads at least."""


class FakeMachine:
    """One machine in the world, with the guest's own life. Times are ``rt.clock.monotonic()``."""

    def __init__(self, machine: Machine, pid: int, started_at: float) -> None:
        self.machine, self.pid, self.started_at = machine, pid, started_at
        self.warm = False
        """Made ahead, and nobody's."""
        self.state = State.CREATED
        self.exit: Exit | None = None
        self.boots = 0
        """How often the guest started its kernel."""
        self.ready_at: float | None = None
        """When the guest's agent answers; None while the CPUs have not run."""
        self.hung = False
        """The hypervisor does not answer."""
        self.deaf = False
        """The guest does not answer, nor obey the power button."""
        self.granted = machine.memory
        self.needed = machine.memory // 4
        """Bytes of memory that the guest uses and cannot give back."""
        self.poll_s = 0
        self.said: tuple[int, float] | None = None
        """What the guest had available when it last said so, and when."""
        self.limits = {drive.name: drive.limits for drive in machine.drives}
        self.told: object = None
        """Who its guest was told to be, last."""
        self.agentless = False
        """The agent in the guest was ended; the guest is well."""
        self.full = False
        """The host's disk under it is full: it stands still at its next write, which is at once."""
        self.drives = {drive.name: DriveStats(name=drive.name) for drive in machine.drives}
        self.links = {card.name: machine.template is None for card in machine.cards}
        """Card → its cable is plugged in."""

    @property
    def alive(self) -> bool:
        return self.exit is None

    @property
    def forwards(self) -> tuple[HostForward, ...]:
        return tuple(forward for card in self.machine.cards for forward in card.forwards)

    def count(self, drive: str, **counts: int) -> None:
        before = self.drives[drive]
        grown = {name: getattr(before, name) + more for name, more in counts.items()}
        self.drives[drive] = msgspec.structs.replace(before, **grown)


class FakeWorld:
    """One host. All times in seconds, drawn evenly between the two ends.

    Args:
        boot: from the CPUs' start to the guest's answer.
        powerdown: from the power button to the end.
        spawn: what ``create`` takes.
        warm: from the CPUs' start to the answer of a forked guest.
        pause: how long a machine stands still to be frozen.
    """

    def __init__(
        self,
        rt: Runtime,
        *,
        root: Path = Path("/fake/vms"),
        boot: tuple[float, float] = (1.0, 3.0),
        powerdown: tuple[float, float] = (0.5, 2.0),
        spawn: tuple[float, float] = (0.03, 0.08),
        warm: tuple[float, float] = (0.02, 0.05),
        pause: tuple[float, float] = (0.01, 0.04),
    ) -> None:
        self.rt, self.root = rt, root
        self.boot, self.powerdown, self.spawn, self.warm, self.pause = boot, powerdown, spawn, warm, pause
        self.machines: dict[str, FakeMachine] = {}
        self.templates = FakeTemplates(
            root.parent / "templates",
            lambda: (one.machine for one in self.machines.values() if one.alive and not one.warm),
        )
        self.foreign_ports: set[tuple[str, int]] = set()
        """(protocol, port) that somebody else on the host listens on."""
        self.accelerator = "tcg"
        self.spawned = 0
        """Processes made since the world began."""
        self._engines: set[FakeEngine] = set()
        self._later: set[asyncio.Task[None]] = set()

    # -- faults ------------------------------------------------------------------------------------------------

    def crash(self, id: str) -> None:
        """The hypervisor's process dies."""
        self.end(self._running(id), Exit(asked=False, signal=11, reason="crashed", last_words="Segmentation fault"))

    def hang(self, id: str, hung: bool = True) -> None:
        """The hypervisor's process stands still (and with it the guest); ``False`` lets it go on."""
        self._running(id).hung = hung

    def deafen(self, id: str, deaf: bool = True) -> None:
        """The guest hangs: no agent answers, the power button does nothing. The hypervisor is well."""
        self._running(id).deaf = deaf

    def end_agent(self, id: str) -> None:
        """Somebody in the guest ends its agent. It comes back with the next boot."""
        self._running(id).agentless = True

    def fill_disk(self, id: str, full: bool = True) -> None:
        """The host's disk under a machine is full, or no longer."""
        machine = self._running(id)
        machine.full = full
        self._write(machine)

    def fail_disk(self, id: str) -> None:
        """A write of the guest fails on the host, and the guest is told."""
        self.publish(EngineEvent(id, "disk-error", "write of root-format: Input/output error"))

    def panic(self, id: str) -> None:
        """The guest's kernel panics."""
        machine = self._running(id)
        machine.state, machine.ready_at = State.PANICKED, None
        self.publish(EngineEvent(id, "panic", "pause"))

    def poweroff(self, id: str) -> None:
        """The guest powers itself off."""
        machine = self._running(id)
        self.publish(EngineEvent(id, "shutdown", "guest-shutdown"))
        self.end(machine, Exit(asked=True, code=0, reason="guest-shutdown"))

    def reboot(self, id: str) -> None:
        """The guest restarts itself."""
        machine = self._running(id)
        self._boot(machine)
        self.publish(EngineEvent(id, "reset", "guest-reset"))

    def work(self, id: str, drive: str, **counts: int) -> None:
        """The guest uses a drive: ``counts`` (``reads``, ``written`` …) are added to its :class:`DriveStats`."""
        self._running(id).count(drive, **counts)

    def need(self, id: str, memory: int) -> None:
        """The guest uses so many bytes of its memory; one that has less takes them out of its balloon."""
        machine = self._running(id)
        machine.needed = memory
        machine.granted = max(machine.granted, memory)

    def lose_power(self) -> None:
        """The host itself goes down: every machine ends without a word, nobody is told."""
        for machine in self.machines.values():
            if machine.alive:
                machine.exit, machine.ready_at = Exit(asked=False, reason="host-reboot"), None
        self.templates.unload()

    # -- what guests and checkers see --------------------------------------------------------------------------

    def guest_at(self, channel: Path) -> FakeMachine | None:
        """The machine behind one of its channels (see :meth:`FakeEngine.channels`), if it is there."""
        return self.machines.get(channel.parent.parent.name)

    def answers(self, id: str) -> bool:
        """The guest has booted, runs and is not deaf."""
        machine = self.machines.get(id)
        return (
            machine is not None
            and machine.alive
            and machine.state is State.RUNNING
            and not (machine.hung or machine.deaf or machine.agentless)
            and machine.ready_at is not None
            and self.rt.clock.monotonic() >= machine.ready_at
        )

    def writers(self, path: Path) -> list[str]:
        """Machines that have ``path`` open for writing: never more than one, in a correct platform."""
        return [
            id
            for id, machine in self.machines.items()
            if machine.alive and any(d.path == path and not d.readonly for d in machine.machine.drives)
        ]

    def publish(self, event: EngineEvent) -> None:
        for engine in self._engines:
            engine.receive(event)

    async def close(self) -> None:
        """End the world: nothing more happens by itself."""
        tasks = list(self._later)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- for the engine ----------------------------------------------------------------------------------------

    def attach(self, engine: FakeEngine, present: bool) -> None:
        """A daemon's engine comes or goes."""
        (self._engines.add if present else self._engines.discard)(engine)

    def check_ports(self, machine: Machine) -> None:
        """Refused ``in-use`` when a port is taken."""
        for forward in (forward for card in machine.cards for forward in card.forwards):
            taken = {(f.protocol, f.host) for m in self.machines.values() if m.alive for f in m.forwards}
            if (forward.protocol, forward.host) in taken | self.foreign_ports:
                raise Refused(
                    f"port {forward.host} of {forward.address} cannot be used: Address already in use",
                    code="in-use",
                    field="ports",
                )

    def start(self, machine: Machine) -> FakeMachine:
        """Make the process; Refused ``in-use`` when a port is taken."""
        self.check_ports(machine)
        self.spawned += 1
        made = FakeMachine(machine, 1000 + self.spawned, self.rt.clock.now())
        self.machines[machine.id] = made
        return made

    def run(self, machine: FakeMachine) -> None:
        """Let the CPUs run."""
        if machine.state is State.CREATED and machine.machine.template is not None:
            machine.boots = 1  # the one that was frozen goes on
            machine.ready_at = self.rt.clock.monotonic() + self.rt.random.uniform(*self.warm)
        elif machine.state is State.CREATED:
            self._boot(machine)
        machine.state = State.RUNNING
        self._write(machine)

    def _write(self, machine: FakeMachine) -> None:
        if machine.full and machine.state is State.RUNNING:
            machine.state = State.STALLED
            self.publish(EngineEvent(machine.machine.id, "disk-full", "write of root-format: No space left on device"))

    def reset(self, machine: FakeMachine) -> None:
        """The reset button."""
        if machine.state is State.CREATED:
            return
        if machine.state is State.PANICKED:
            machine.state = State.RUNNING
        self._boot(machine)
        self.publish(EngineEvent(machine.machine.id, "reset", "host-qmp-system-reset"))

    def press(self, machine: FakeMachine) -> None:
        """The power button. A guest that has not booted yet does not see it."""
        if self.answers(machine.machine.id):
            task = asyncio.create_task(self._obey(machine, machine.boots))
            self._later.add(task)
            task.add_done_callback(self._later.discard)

    async def _obey(self, machine: FakeMachine, boots: int) -> None:
        await self.rt.clock.sleep(self.rt.random.uniform(*self.powerdown))
        while machine.alive and (machine.hung or machine.state in (State.PAUSED, State.STALLED)):
            await self.rt.clock.sleep(0.5)
        same = self.machines.get(machine.machine.id) is machine and machine.boots == boots
        if same and machine.alive and machine.state is State.RUNNING and not machine.deaf:
            self.poweroff(machine.machine.id)

    def _boot(self, machine: FakeMachine) -> None:
        machine.boots += 1
        machine.deaf = machine.agentless = False
        for drive in machine.machine.drives:
            if drive.bootable:
                machine.count(drive.name, reads=1, read=SECTOR)
                break
        machine.ready_at = self.rt.clock.monotonic() + self.rt.random.uniform(*self.boot)

    def end(self, machine: FakeMachine, exit: Exit) -> None:
        """The process is over."""
        machine.exit, machine.ready_at = exit, None
        self.publish(EngineEvent(machine.machine.id, "exited", exit.reason))

    def _running(self, id: str) -> FakeMachine:
        machine = self.machines[id]
        assert machine.alive, f"machine {id} has ended"
        return machine


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
        if not serves(warm.machine, wanted) or not warm.alive or warm.hung:
            return False
        await self._rt.faults.at("engine.take.given")
        warm.machine, warm.limits = wanted, {drive.name: drive.limits for drive in wanted.drives}
        warm.warm = False
        await self._rt.faults.at("engine.take.recorded")
        return True

    async def warm(self, machine: Machine) -> Sighting:
        check(machine)
        if machine.template is None or any(card.forwards for card in machine.cards):
            raise Refused("only a fork without ports can be made ahead", code="unsupported")
        async with self._starting.setdefault(machine.id, asyncio.Lock()):
            known = self._world.machines.get(machine.id)
            if known is None:
                await self._start(machine, warm=True)
            elif not (known.alive and known.warm):
                raise Refused(f"there is a machine {machine.id} already", code="in-use")
            return await self._look(machine.id, self._world.machines[machine.id])

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
