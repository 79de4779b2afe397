"""The groups of one host's VMs, whatever the kernel's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from corral.host.cgroup.meter import Meter

PERIOD_S = 0.02
"""Period of caps. Below 10 ms they lose some per cent systematically; with 100 ms a second is off by up to a period."""


class Groups(Protocol):
    """Calls take microseconds and are idempotent. Raise CorralError when the kernel refuses; a group that is not there
    has used nothing."""

    @property
    def shares(self) -> bool:
        """CPU weights can be set."""
        ...

    @property
    def limits_memory(self) -> bool:
        """A limit of what a VM's processes take can be set."""
        ...

    @property
    def parents(self) -> tuple[Path, ...]:
        """What the groups of all VMs are in, one for each hierarchy."""
        ...

    def describe(self) -> str:
        """In a sentence for people: what works; what is missing, and why."""
        ...

    def prepare(self, id: str) -> tuple[Path, ...]:
        """Have the groups of a VM; returns the files its process writes its pid into before it becomes QEMU."""
        ...

    def weight(self, id: str, cores: float) -> None:
        """Weight against the other VMs. Only ratios count; as a scale, one core's worth is 1.0."""
        ...

    def weight_file(self, id: str) -> Path | None:
        """Where the weight of a VM is written, by those who write it often or on somebody's behalf. None: nowhere."""
        ...

    def weight_text(self, cores: float) -> str:
        """What :meth:`weight` writes there."""
        ...

    def cap(self, id: str, cores: float | None) -> None:
        """At most so many cores' time in each period of :data:`PERIOD_S`; None lifts it."""
        ...

    def meter(self, id: str) -> Meter:
        """What reads its CPU time, and the seconds in which its threads were held by the cap. To be closed."""
        ...

    def memory_limit(self, id: str, limit: int | None) -> None:
        """Bytes beyond which the kernel ends processes of the VM: a safety net, far above its use. None lifts it."""
        ...

    def memory_usage(self, id: str) -> int | None:
        """Bytes charged to the VM; None where they are not counted."""
        ...

    def ooms(self, id: str) -> int:
        """How many of its processes the kernel ended for memory."""
        ...

    def starved(self, id: str) -> bool:
        """Its processes stand still at their limit of memory, because somebody told the kernel not to end them."""
        ...

    def remove(self, id: str) -> None:
        """Forget the groups of a VM that has no process. One that still has some stays (Refused ``in-use``)."""
        ...

    def inventory(self) -> list[str]:
        """VMs that have a group."""
        ...

    def close(self) -> None:
        """The daemon ends: nothing is left here of a host that has no VMs."""
        ...
