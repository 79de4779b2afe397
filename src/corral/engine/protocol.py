"""What the agent asks of a hypervisor. Two implementations: :mod:`corral.engine.qemu` and :mod:`corral.engine.fake`.

Every call has a deadline of its own inside, is idempotent, and touches one machine only. Deadlines that pass raise
:class:`~corral.errors.Unavailable` with code ``unresponsive``; a refusal of the hypervisor raises
:class:`~corral.errors.CorralError` with code ``engine`` and its last words.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    pass


class KernelBoot(Struct, frozen=True, kw_only=True):
    """Direct kernel boot: no firmware menu, no boot loader."""

    kernel: Path
    initrd: Path | None = None
    cmdline: str = ""


class Layer(Struct, frozen=True, kw_only=True):
    """A file under a qcow2 overlay: opened read-only, never changed again."""

    path: Path
    format: Literal["raw", "qcow2"]


class Limits(Struct, frozen=True, kw_only=True):
    """How fast a guest may use a drive, reads and writes together; 0 is no limit.

    A burst is a faster rate, for as long as credit lasts: ``burst_s`` seconds' worth of it, saved up while the guest
    does less than the steady rate, which goes on being earned during the burst.
    """

    iops: int = 0
    """Reads and writes a second."""
    bandwidth: int = 0
    """Bytes a second."""
    iops_burst: int = 0
    """No less than ``iops``; nothing without it."""
    bandwidth_burst: int = 0
    """No less than ``bandwidth``; nothing without it."""
    burst_s: int = 10
    """At least 2: in the first second of a burst nobody counts its rate."""


class Drive(Struct, frozen=True, kw_only=True):
    """A disk or CD of the machine. Formats are stated, never probed."""

    name: str
    """``root``, ``seed`` …: becomes the node and device id."""
    path: Path
    format: Literal["raw", "qcow2"]
    layers: tuple[Layer, ...] = ()
    """What lies under a qcow2 overlay, the next one first: an image, the disks of templates. This, not what a file's
    header says, is what is opened."""
    readonly: bool = False
    bootable: bool = False
    cdrom: bool = False
    """Shown as a CD-ROM (installer ISOs); everything else is virtio-blk."""
    limits: Limits = Limits()
    """From the start; :meth:`Engine.throttle` changes them."""

    @property
    def chain(self) -> tuple[Layer, ...]:
        """The layers of an overlay over this drive, once nobody writes to it any more."""
        return (Layer(path=self.path, format=self.format), *self.layers)


class HostForward(Struct, frozen=True, kw_only=True):
    protocol: Literal["tcp", "udp"]
    address: str
    host: int
    guest: int


class Card(Struct, frozen=True, kw_only=True):
    """A NIC. Now always user mode."""

    name: str
    mac: str
    hostname: str
    forwards: tuple[HostForward, ...] = ()


class Machine(Struct, frozen=True, kw_only=True):
    """The whole virtual hardware of one VM. ``id`` is the VM's UUID, shown to the guest too."""

    id: str
    name: str
    epoch: int = 0
    arch: str = "x86_64"
    cpus: int = 1
    cpu_model: str | None = None
    memory: int
    """Bytes."""
    firmware: Literal["bios", "uefi"] = "bios"
    kernel: KernelBoot | None = None
    drives: tuple[Drive, ...] = ()
    cards: tuple[Card, ...] = ()
    joins: tuple[Path, ...] = ()
    """Files (``cgroup.procs``) that its process writes its pid into before it becomes the hypervisor."""
    template: str | None = None
    """Id of the :class:`Template` that it is forked from: it starts in the middle of that machine's life, with the
    memory and devices it had. None: it boots."""


class State(StrEnum):
    """What the hypervisor says of a machine. ``absent``: no process and no trace. ``exited``: it ran and ended."""

    ABSENT = "absent"
    CREATED = "created"
    """The process is there, its CPUs have not run yet."""
    RUNNING = "running"
    PAUSED = "paused"
    STALLED = "stalled"
    """Its CPUs stand still because a disk of the host failed or is full; they may be let run again."""
    SHUTDOWN = "shutdown"
    """The guest powered off; the process is about to end."""
    PANICKED = "panicked"
    EXITED = "exited"
    UNRESPONSIVE = "unresponsive"
    """The process lives and does not answer."""


class Exit(Struct, frozen=True, kw_only=True):
    """How a machine's process ended. ``code`` and ``signal`` are None where they cannot be known (adopted process)."""

    asked: bool
    """Stop or kill was asked for, or the guest powered itself off in good order."""
    code: int | None = None
    signal: int | None = None
    reason: str = ""
    """``guest-shutdown`` and the other causes that QEMU names, ``killed``, ``crashed``, ``exited``; ``vanished``
    (nobody saw how), ``never-started``, ``host-reboot``."""
    last_words: str = ""
    """Tail of the hypervisor's stderr, at most 2 KiB."""


class Sighting(Struct, frozen=True, kw_only=True):
    """What is seen of one machine, now."""

    id: str
    state: State
    pid: int | None = None
    started_at: float | None = None
    """Wall time."""
    epoch: int = 0
    accelerator: str = ""
    memory: int = 0
    """Bytes its hardware has; 0 of one that is not known."""
    exit: Exit | None = None
    fault: str = ""
    """Of a stalled one: ``disk-full`` or ``disk-error``."""
    forwards: tuple[HostForward, ...] = ()
    template: str | None = None
    """What it was forked from: that template's memory is held as long as this process lives."""


class Template(Struct, frozen=True, kw_only=True):
    """A booted machine, frozen: any number of others are forked from it. Made by :meth:`Engine.freeze`."""

    id: str
    """A UUID."""
    machine: Machine
    """As it ran. Its drives are the template's own files: the disk of a fork is a fresh qcow2 overlay whose ``layers``
    are the ``chain`` of the drive of the same name."""
    hardware: str
    """See :meth:`Engine.hardware`."""
    memory: int
    """Bytes of RAM that it takes on the host while it is loaded, once for all its forks."""
    disk: int
    """Bytes of its files, without what they share with others."""
    made_at: float
    """Wall time."""
    digest: str = ""
    """SHA-256 of its RAM."""
    pause_s: float | None = None
    """How long the machine stood still for it."""
    copied: int = 0
    """Bytes that were copied meanwhile: what the machine changed between the first copy and the pause."""
    loaded: bool = False
    """Its RAM is in memory now. If not (no machine was here, the host was booted) its next fork loads it."""
    stale: str = ""
    """Why nothing may be forked from it any more; empty: it may."""


class EngineEvent(NamedTuple):
    """Something happened to a machine.

    ``kind`` is ``exited``, ``state``, ``panic``, ``reset``, ``shutdown``, ``disk-error`` (the guest was told) or
    ``disk-full`` (it stands still).
    """

    id: str
    kind: str
    message: str = ""


class DriveStats(Struct, frozen=True, kw_only=True):
    """What the guest did with one drive since its process began."""

    name: str
    read: int = 0
    """Bytes."""
    written: int = 0
    """Bytes."""
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    failed: int = 0
    """Reads, writes, flushes and discards that the host could not do."""


class CardStats(Struct, frozen=True, kw_only=True):
    """What went through one card since its process began, in bytes; None where nobody counts (user mode)."""

    name: str
    received: int | None = None
    sent: int | None = None


class Stats(Struct, frozen=True, kw_only=True):
    """Counters of a machine's devices. They only grow, and begin at 0 with each process."""

    drives: tuple[DriveStats, ...] = ()
    cards: tuple[CardStats, ...] = ()


class MemorySight(Struct, frozen=True, kw_only=True):
    """Memory of a machine, in bytes. What its guest says is None where it says nothing (no driver, not booted yet)."""

    size: int
    """What its hardware has."""
    granted: int
    """What the guest may use of it now: the rest is in its balloon."""
    available: int | None = None
    """What the guest could still use without hurting itself: free memory and caches it can drop."""
    free: int | None = None
    total: int | None = None
    """All that the guest's kernel manages: less than ``granted`` by what the kernel keeps for itself."""
    at: float | None = None
    """Wall time at which the guest said it, whole seconds. Only polled guests say anything new."""


class Probe(Struct, frozen=True, kw_only=True):
    """One way of making CPUs, tried for real."""

    name: str
    works: bool
    reason: str
    at: float = 0.0


class Capabilities(Struct, frozen=True, kw_only=True):
    """What this engine can do on this host."""

    engine: str
    """Name and version for people: ``QEMU 7.2.22``."""
    arch: str
    accelerator: str
    """The one that machines get: the first that works."""
    probes: tuple[Probe, ...]
    machine_types: tuple[str, ...] = ()
    firmware: tuple[str, ...] = ("bios",)
    overhead: int = 0
    """Bytes that a machine costs beyond its guest memory."""
    confinement: str = ""
    """How machines are kept apart here, in a sentence for people."""


class Channels(NamedTuple):
    """Unix sockets of a machine, for the rooms that speak through them."""

    serial: Path
    guest: Path
    """corral-guest."""
    qga: Path
    """qemu-guest-agent."""


class Engine(Protocol):
    """A hypervisor on this host."""

    async def probe(self, *, again: bool = False) -> Capabilities:
        """What works here. Cached per boot of the host unless ``again``."""
        ...

    async def inventory(self) -> list[Sighting]:
        """Every machine that has a process or a trace on this host; one sighting each, never an exception for one."""
        ...

    async def inspect(self, id: str) -> Sighting:
        """One machine. Never raises for a silent one: state is ``unresponsive``."""
        ...

    async def create(self, machine: Machine, *, warm: bool = False) -> Sighting:
        """Have a process with this hardware whose CPUs do not run yet. A machine that is there already is left alone.

        With ``machine.template`` its memory and devices are those of the template, and the links of its cards are down
        until :meth:`link`: the guest must be told who it is before its first packet.

        Args:
            warm: what was made by :meth:`warm` under this id becomes this machine, in one step, if it is well and
                differs in nothing but what it can be given (name, epoch, the kernel's command line, limits, host names
                and ports). If not, and without ``warm``, it ends first.

        Raises :class:`~corral.errors.Refused` code ``in-use`` with ``field="ports"`` when a forwarded port is taken;
        with ``field="template"``: NotFound, ``stale`` with the reason, ``unsupported`` when its hardware is another.
        """
        ...

    async def warm(self, machine: Machine, rehearse: Callable[[], Awaitable[None]] | None = None) -> Sighting:
        """Have a fork with its state loaded, that is nobody's yet: nothing but :meth:`pool` knows of it, and
        :meth:`inspect` calls it absent, until :meth:`create` takes it. It ends with its template, by :meth:`kill` and
        by :meth:`remove`. It has no forwards. Raises what :meth:`create` raises; ``in-use`` when the id is.

        ``rehearse``: called once while its CPUs run, with its cables out; afterwards they stand still. What it raises
        is passed on, and the machine is no use then.
        """
        ...

    async def pool(self) -> list[Sighting]:
        """Those that are nobody's. One that can be taken is ``created``."""
        ...

    async def resume(self, id: str) -> None:
        """Let the CPUs run (first start, or after pause)."""
        ...

    async def link(self, id: str, card: str, up: bool) -> None:
        """Plug the network cable of a card in or out. Only a fork starts with it out."""
        ...

    async def drives(self, id: str) -> tuple[Drive, ...]:
        """What the drives of a machine that runs are now: those it was started with, or the overlays since then."""
        ...

    async def hardware(self, machine: Machine) -> str:
        """A digest of all that a fork must have in common with its template: the virtual hardware (not names, paths,
        addresses and ports), the hypervisor's build, the accelerator, this host's kernel and CPU flags. Equal digests
        mean: one can be forked from the other.
        """
        ...

    async def freeze(self, id: str, template: str, overlays: Mapping[str, Drive]) -> Template:
        """Make a template of a machine that runs, and that goes on in the same process after a pause of milliseconds.

        RAM, devices and disks are those of one instant. Repeating it with the same ``template`` (a new UUID) returns
        what was made, or finishes or begins again what was interrupted.

        Args:
            overlays: every writable drive as it is from then on: a fresh qcow2 file with nothing in it, whose first
                layer is the file written so far (or another name of it, on the same file system) and whose further
                layers are that file's. An overlay that was made and not switched to may be used at the next start:
                it says the same. The template links the files, so they may be renamed and deleted.

        Raises Refused: ``wrong-phase`` when it does not run, ``unsupported`` when it cannot be frozen.
        """
        ...

    async def templates(self) -> list[Template]:
        """The templates on this host; ``stale`` says which of them cannot be used any more."""
        ...

    async def discard(self, template: str) -> None:
        """Have nothing left of a template and of what is :meth:`warm`. Its disks live on where others hold links of
        them (hard links).

        Raises Refused ``in-use`` while a process forked from it lives.
        """
        ...

    async def pause(self, id: str) -> None: ...

    async def reset(self, id: str) -> None:
        """Press the reset button."""
        ...

    async def powerdown(self, id: str) -> None:
        """Press the power button: ask the guest. Returns at once."""
        ...

    async def kill(self, id: str) -> None:
        """Cut the power. Returns when the process is gone; leaves the trace with its exit, for :meth:`inspect`."""
        ...

    async def remove(self, id: str) -> None:
        """Forget a machine that does not run: no file, socket or record of it is left."""
        ...

    async def listens(self, id: str) -> bool:
        """Somebody in the guest holds corral-guest's port open. Raises Refused ``wrong-phase`` when it does not run."""
        ...

    async def vcpus(self, id: str) -> tuple[int, ...]:
        """Thread ids of the virtual CPUs, in their order. Raises Refused ``wrong-phase`` when it does not run."""
        ...

    async def stats(self, id: str) -> Stats:
        """What its drives and cards did, in their order. Raises Refused ``wrong-phase`` when it does not run."""
        ...

    async def memory(self, id: str) -> MemorySight:
        """Its memory now. Raises Refused ``wrong-phase`` when it does not run."""
        ...

    async def poll_memory(self, id: str, every_s: int) -> None:
        """Have the guest say this often, in whole seconds, what memory it needs; 0: never, which costs nothing."""
        ...

    async def balloon(self, id: str, target: int) -> None:
        """Let the guest have ``target`` bytes of its memory, at most all. Returns at once; the guest follows in its own
        time. Never ask for what it needs itself: it would try for ever, and burn CPU time doing so."""
        ...

    async def throttle(self, id: str, drive: str, limits: Limits) -> None:
        """Limit a drive like this from now on. Raises Refused ``wrong-phase``; NotFound when it has no such drive."""
        ...

    def channels(self, id: str) -> Channels: ...

    def events(self) -> AsyncIterator[EngineEvent]:
        """Events of all machines, including adopted ones, from now on. One consumer."""
        ...

    async def close(self) -> None:
        """Let go of all machines (they go on running). Without one, templates' memory is let go of too."""
        ...
