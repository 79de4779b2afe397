"""One pretended machine: its process, and what its guest is at. :mod:`~corral.engine.fake.world` has it live."""

from __future__ import annotations

import msgspec

from corral.engine.protocol import DriveStats, Exit, HostForward, Machine, State


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
