"""A virtual machine: what its owner wants, and what the agent sees."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

import msgspec

from corral.model.base import Resource, Struct
from corral.units import MIB


class Power(StrEnum):
    """What the VM should be doing."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class Restart(StrEnum):
    """What happens when the guest or its QEMU ends without being asked to."""

    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class OnHang(StrEnum):
    """What happens when the guest, or its QEMU, has been silent for long."""

    RESTART = "restart"
    """Its power is cut, and it starts again as ``restart`` says."""
    REPORT = "report"
    """It is told, nothing else."""


class Phase(StrEnum):
    """What the VM is seen doing. ``unknown`` is a state of its own: nothing is started or destroyed on a guess."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    STOPPED = "stopped"
    UNRESPONSIVE = "unresponsive"
    ERROR = "error"
    UNKNOWN = "unknown"


class Cpu(Struct, frozen=True, kw_only=True):
    """Virtual CPUs."""

    count: int = 1
    """1 to 64."""
    model: str | None = None
    """QEMU CPU model; None takes the platform's default for the accelerator."""
    weight: int = 100
    """Share of the CPU time of its project when that is short, 1 to 10000: twice as much means twice the time."""
    limit: float | None = None
    """Cores' time that it gets at most, even when the host is idle, like 0.5; None: as many as it has CPUs."""
    reserve: float = 0.0
    """Cores' time that it gets whenever it wants it, whatever the others want."""
    burst: float = 0.0
    """CPU-seconds that it may save up while it uses less than its limit, and spend above it; 0: none."""


class Memory(Struct, frozen=True, kw_only=True):
    """Guest memory."""

    size: int = 512 * MIB
    """Bytes, a multiple of 1 MiB. While it runs: less takes effect at once, more than it was started with at the next
    start."""
    reserve: int | None = None
    """Bytes that stay its own when the host is short of memory; None: all of it on a host that does not overcommit,
    nothing beyond what its guest uses on one that does."""
    weight: int = 100
    """Against other VMs when memory is short, 1 to 10000."""


class Disk(Struct, frozen=True, kw_only=True):
    """The root disk, an overlay over the image."""

    size: int | None = None
    """Bytes; None keeps the image's own size. Never smaller than the image; it can grow, and never shrinks."""
    iops: int | None = None
    """Reads and writes a second at most, together; None: no limit."""
    bandwidth: int | None = None
    """Bytes a second at most, read and written together; None: no limit."""
    iops_burst: int | None = None
    """Reads and writes a second while credit lasts, at least ``iops``; None: no burst."""
    bandwidth_burst: int | None = None
    """Bytes a second while credit lasts, at least ``bandwidth``; None: no burst."""
    burst_s: int = 10
    """Credit for bursts: so many seconds' worth of the burst rate, saved up while less than the limit is used."""


class Forward(Struct, frozen=True, kw_only=True):
    """A port of the host that leads to a port of the guest."""

    host: int
    """Port on the host; 0 lets the agent choose (shown in ``status.ports``)."""
    guest: int
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = "127.0.0.1"
    """IPv4 address of the host to listen on."""


class Nic(Struct, frozen=True, kw_only=True):
    """A network card."""

    network: str = "user"
    mac: str = ""
    """Empty at creation: the platform chooses one."""
    publish: tuple[Forward, ...] = ()
    rate: int | None = None
    """Bytes a second at most, in each direction; None: no limit. User-mode networking cannot limit."""


class VmSpec(Struct, frozen=True, kw_only=True):
    """What the owner wants."""

    image: str
    """Short name of the image; resolved to ``image_id`` when the VM is created."""
    image_id: str = ""
    flavor: str | None = None
    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    disk: Disk = Disk()
    nics: tuple[Nic, ...] = (Nic(),)
    """Empty: a VM without a network."""
    user_data: str = ""
    """cloud-init user data, up to 64 KiB."""
    ssh_keys: tuple[str, ...] = ()
    """OpenSSH public keys, without options."""
    hostname: str = ""
    """Empty: the VM's name."""
    firmware: Literal["auto", "bios", "uefi"] = "auto"
    cold: bool = False
    """Boot it, even where a template would have it up in a fraction of the time."""
    template: str = ""
    """Id of the template that it must be forked from (a fork of a running VM); written by the platform."""
    restart: Restart = Restart.ON_FAILURE
    on_hang: OnHang = OnHang.RESTART
    """Only guests whose ``corral-guest`` has answered in this boot can be told to hang; not with ``restart: never``."""
    power: Power = Power.RUNNING
    boots: int = 1
    """Wanted count of boots: one more asks for a restart."""
    resets: int = 0
    """Wanted count of hard resets."""
    ephemeral: bool = False
    """It lives only while somebody holds it (``GET /v1/vms/REF/hold``): deleted soon after nobody does any more."""
    force: bool = False
    """The present wish (stop, restart, delete) cuts the power instead of asking the guest."""


class Port(Struct, frozen=True, kw_only=True):
    """A published port as it really is."""

    host: int
    guest: int
    protocol: str
    address: str
    purpose: str = "publish"
    """``publish`` (asked for) or ``ssh`` (made by Corral)."""


class VmStatus(Struct, frozen=True, kw_only=True):
    """What is seen. Written by the agent, except ``host`` and ``epoch``, which placement writes."""

    phase: Phase = Phase.PENDING
    reason: str = ""
    """Why the phase is not what was asked for; empty when it is."""
    cause: str = ""
    """The same as one stable word: guest-panic, guest-hang, qemu-silent, out-of-memory, disk-full …; empty when all is
    well."""
    host: str = ""
    epoch: int = 0
    """Rises with every placement; an agent never acts on a lower one than it has seen."""
    accelerator: str = ""
    """``kvm`` or ``tcg``: how its CPUs are made."""
    memory: int | None = None
    """Bytes of its hardware: what it was started with."""
    pid: int | None = None
    started_at: float | None = None
    boots: int = 0
    """Boots done: trails ``spec.boots`` while a restart is under way."""
    resets: int = 0
    addresses: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    template: str = ""
    """Name of the template that it was forked from; empty: it was booted (``details.start.why`` says why)."""
    guest: str = ""
    """Who answers inside: ``corral-guest``, ``qemu-guest-agent`` or empty."""
    failures: int = 0
    """Unasked ends in a row; a healthy time resets it."""
    retry_at: float | None = None
    """Wall time of the next automatic restart."""
    observed: int = 0
    """The ``meta.generation`` that this status answers."""
    details: dict[str, Any] = {}


class Start(Struct, frozen=True, kw_only=True):
    """How a VM came up last: ``status.details.start``."""

    how: Literal["", "cold", "fork"] = ""
    """``fork``: from a template; ``cold``: it booted; empty: not started yet."""
    why: str = ""
    """Why it was booted."""
    template: str = ""
    template_id: str = ""
    source: str = ""
    """Name of the running VM that it was forked from."""
    pause_s: float | None = None
    """How long that VM stood still."""
    warm: bool = False
    """Its process was there before it was asked for."""
    done: bool = False
    """Its guest has answered and, of a fork, has its identity: from now on its disk is its own."""
    timings: dict[str, float] = {}
    """Seconds from the request to each step: ``disk``, ``process``, ``resumed``, ``answer``, ``identity``."""


class Vm(Resource, frozen=True, kw_only=True, tag_field="kind", tag="vm"):
    KIND: ClassVar[str] = "vm"
    spec: VmSpec
    status: VmStatus = VmStatus()


def start_of(vm: Vm) -> Start:
    """How a VM came up, as its status tells."""
    told = vm.status.details.get("start")
    return msgspec.convert(told, Start) if isinstance(told, dict) else Start()
