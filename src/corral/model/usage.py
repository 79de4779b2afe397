"""Who uses what on a host, at one moment. CPU in cores (1.0 is one CPU's full time), memory in bytes.

No kind: it is measured when somebody asks and never stored. A value that is not known is None, never a guess.
"""

from __future__ import annotations

from corral.model.base import Struct
from corral.model.vm import Phase


class CpuTotals(Struct, frozen=True, kw_only=True):
    """Core-seconds since the daemon first saw the VM's process; they only grow, and begin anew with the daemon."""

    entitled: float
    used: float
    wait: float
    throttled: float


class CpuUsage(Struct, frozen=True, kw_only=True):
    """CPU time of one VM over the last period, beside what its record says. All None while no governor reports."""

    weight: int
    reserve: float
    limit: float
    """What it gets at most: its own limit, or as many cores as it has CPUs."""
    entitled: float | None = None
    """What it should have had, by its weight and what it wanted."""
    granted: float | None = None
    """What it could have had at least, had it wanted more."""
    used: float | None = None
    wanted: float | None = None
    """What it would use if it had the host to itself, never more than its CPUs."""
    wait: float | None = None
    """Threads that were ready to run and did not run, on average."""
    credit: float | None = None
    """CPU-seconds that it is owed; below zero: that it has had too much."""
    burst: float = 0.0
    """CPU-seconds that it may save up, by its record."""
    saved: float | None = None
    """CPU-seconds that it has saved up: it may use them above its limit."""
    throttled: float | None = None
    """Cores' time that its limit held back."""
    total: CpuTotals | None = None


class MemoryUsage(Struct, frozen=True, kw_only=True):
    """Memory of one VM."""

    size: int
    """What its record says."""
    reserve: int | None = None
    """What stays its own, as in its record."""
    granted: int | None = None
    """What its guest may use now: less than the size while memory is short."""
    guest_used: int | None = None
    """What its guest uses and cannot give back. Guests are asked only while that matters."""
    used: int | None = None
    """What its QEMU holds of the host's memory; pages shared with others count in part."""


class DiskUsage(Struct, frozen=True, kw_only=True):
    """What the guest did with one drive: counters since its process began, and rates (a second) between two looks.

    Rates are None at the first look, and when the one before was too long ago to mean now.
    """

    name: str
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    reads: int
    writes: int
    flushes: int
    failed: int
    read_rate: float | None = None
    """Bytes a second."""
    write_rate: float | None = None
    """Bytes a second."""
    iops: float | None = None
    """Reads and writes a second."""


class NicUsage(Struct, frozen=True, kw_only=True):
    """What went through one network card; None where nobody counts (user-mode networking)."""

    name: str
    received: int | None = None
    sent: int | None = None
    receive_rate: float | None = None
    """Bytes a second."""
    send_rate: float | None = None
    """Bytes a second."""


class VmUsage(Struct, frozen=True, kw_only=True):
    """One VM that has a process."""

    id: str
    name: str
    project: str
    phase: Phase
    accelerator: str = ""
    cpu: CpuUsage
    memory: MemoryUsage
    disks: tuple[DiskUsage, ...] = ()
    """Empty while its QEMU does not answer."""
    nics: tuple[NicUsage, ...] = ()


class ProjectUsage(Struct, frozen=True, kw_only=True):
    """The running VMs of one project together. A sum is None when nothing of it is known."""

    name: str
    weight: int
    reserve: float
    limit: float | None
    vms: int
    entitled: float | None = None
    granted: float | None = None
    used: float | None = None
    memory_size: int = 0
    memory_used: int | None = None
    disk_read: float | None = None
    """Bytes a second."""
    disk_write: float | None = None
    """Bytes a second."""
    disk_iops: float | None = None
    receive: float | None = None
    """Bytes a second."""
    send: float | None = None
    """Bytes a second."""


class HostUsage(Struct, frozen=True, kw_only=True):
    """The host over the last period."""

    name: str
    cores: int
    memory: int
    memory_available: int
    mode: str = ""
    """How CPU shares are enforced, for people; empty while no governor reports."""
    shares: bool = False
    """Weights and limits of CPU time can be enforced here: control groups can be written."""
    steering: bool = False
    """Threads are moved between cores right now."""
    period_s: float | None = None
    idle: float | None = None
    foreign: float | None = None
    """Cores used by what is no VM."""
    governor: float | None = None
    """Cores that dividing the CPU time costs."""


class Usage(Struct, frozen=True, kw_only=True):
    """Everything at one moment; VMs by project and name."""

    at: float
    """Wall time, seconds since 1970."""
    host: HostUsage
    vms: tuple[VmUsage, ...] = ()
    projects: tuple[ProjectUsage, ...] = ()
