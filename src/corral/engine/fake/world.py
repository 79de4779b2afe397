"""One pretended host: its machines, ports and templates, and whatever befalls them. It survives daemons.

A machine boots, obeys the power button and dies in random but repeatable times; the other methods are the faults that
tests play. Daemons act on it through :mod:`~corral.engine.fake.engine`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from corral.engine.fake.machine import FakeMachine
from corral.engine.fake.templates import FakeTemplates
from corral.engine.protocol import EngineEvent, Exit, Machine, State
from corral.errors import Refused
from corral.runtime import Runtime

SECTOR = 512
"""Bytes that a boot reads at least."""


class Ears(Protocol):
    """Who is told of what happens: the engine of a daemon."""

    def receive(self, event: EngineEvent) -> None:
        """An event of the world."""
        ...


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
        self._engines: set[Ears] = set()
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

    def attach(self, engine: Ears, present: bool) -> None:
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
