"""Which host takes a VM: filter → score → choose, over an immutable picture, with a sentence for every refusal.

Used unchanged by the API (refuse before anything is written), by placement (choose) and by the agent (admission at
the last moment). Memory is never overcommitted unless a host's record says how far: what is configured counts, and the
hypervisor's own overhead with it. What VMs reserve, and the overhead, always fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from corral.model import Host, Memory, Power, Template, TemplatePhase, Vm
from corral.model.template import memory_of
from corral.units import GIB, MIB

DEFAULT_OVERHEAD = 60 * MIB
"""A QEMU beyond its guest memory (heap, libraries, a 32 MiB translation buffer), where no host has measured it."""

DISK_FLOOR = 256 * MIB
"""Below this much free disk nothing new is placed: an overlay must be able to grow while the guest boots."""


class Need(NamedTuple):
    """What a VM asks of a host. ``host``: only there (its disk is there); empty for anywhere. Bytes."""

    memory: int
    cpus: int = 1
    arch: str = ""
    host: str = ""
    reserve: int = 0
    """Of ``memory``: what it must have even when the host is short of it."""


class Room(NamedTuple):
    """What a host has. ``used`` counts the memory of its VMs, without overhead, ``promised`` what they reserve of it,
    ``vms`` how many they are. ``budget``: what they may take together, if that is less than all the host can spare."""

    host: str
    phase: str = "ready"
    cordoned: bool = False
    arch: str = ""
    cpus: int = 1
    memory: int = 0
    reserved: int = 0
    overhead: int = DEFAULT_OVERHEAD
    used: int = 0
    vms: int = 0
    disk_free: int | None = None
    templates: int = 0
    """Bytes that templates hold, each once for all its forks."""
    budget: int | None = None
    overcommit: float = 1.0
    promised: int = 0

    @property
    def capacity(self) -> int:
        """Bytes that all VMs may really take, overhead included; never negative."""
        return max(0, capacity_of(self.memory - self.reserved, self.budget) - self.templates)

    @property
    def free(self) -> int:
        """Bytes that new VMs can be given, overhead included; never negative."""
        return max(0, int(self.capacity * self.overcommit) - self.used - self.vms * self.overhead)

    @property
    def unreserved(self) -> int:
        """Bytes that new VMs can reserve, overhead included; never negative."""
        return max(0, self.capacity - self.promised - self.vms * self.overhead)


def capacity_of(spare: int, budget: int | None) -> int:
    """Bytes that VMs and templates of a host may take: its budget, but no more than what it can spare."""
    return max(0, spare if budget is None else min(budget, spare))


class Verdict(NamedTuple):
    """What was decided about one host. ``reason`` is empty when it fits; else ``filter: numbers``."""

    host: str
    fits: bool
    filter: str = ""
    reason: str = ""
    score: float = 0.0

    def as_row(self) -> dict[str, Any]:
        """For a problem body's ``details["hosts"]`` and for ``explain``."""
        return {"host": self.host, "fits": self.fits, "filter": self.filter, "reason": self.reason, "score": self.score}


def need_of(vm: Vm, *, arch: str = "", host: str = "") -> Need:
    """The need of a VM; ``arch`` and ``host`` come from its image."""
    memory = vm.spec.memory
    return Need(memory=memory.size, cpus=vm.spec.cpu.count, arch=arch, host=host, reserve=memory.reserve or 0)


class Taken(NamedTuple):
    """What VMs take together: their memory, what they reserve of it, how many they are."""

    memory: int = 0
    reserve: int = 0
    vms: int = 0

    def plus(self, memory: Memory, sign: int = 1) -> Taken:
        """With one VM more, or (``sign`` -1) one less."""
        reserve = self.reserve + sign * (memory.reserve or 0)
        return Taken(self.memory + sign * memory.size, reserve, self.vms + sign)


def kept(template: Template) -> int:
    """Bytes of memory that a template takes from VMs. One that the platform made and nobody uses goes when a VM needs
    its memory."""
    status = template.status
    if status.phase in (TemplatePhase.PENDING, TemplatePhase.ERROR) or (template.spec.auto and not status.forks):
        return 0
    return memory_of(template)


def rooms(
    hosts: Iterable[Host], vms: Iterable[Vm], *, templates: Iterable[Template] = (), without: str = ""
) -> list[Room]:
    """The hosts as rooms, in order of name. Every VM that is to run counts where it is placed, except ``without``."""
    held: dict[str, int] = {}
    for template in templates:
        held[template.status.host] = held.get(template.status.host, 0) + kept(template)
    taken: dict[str, Taken] = {}
    for vm in vms:
        if vm.status.host and vm.meta.id != without and vm.spec.power is not Power.STOPPED and not vm.meta.deleted:
            taken[vm.status.host] = taken.get(vm.status.host, Taken()).plus(vm.spec.memory)
    found = []
    for host in hosts:
        status = host.status
        used, promised, count = taken.get(host.meta.name, Taken())
        found.append(
            Room(
                host=host.meta.name, phase=status.phase, cordoned=host.spec.cordoned, arch=status.arch,
                cpus=status.cpus, memory=status.memory, reserved=status.memory_reserved,
                overhead=status.overhead or DEFAULT_OVERHEAD, used=used, vms=count, promised=promised,
                disk_free=status.disk_free or None, budget=host.spec.memory_budget,
                overcommit=host.spec.memory_overcommit, templates=held.get(host.meta.name, 0),
            )
        )  # fmt: skip
    return sorted(found)


def _ready(_need: Need, room: Room) -> str:
    return "" if room.phase == "ready" else f"the host is {room.phase}"


def _cordon(_need: Need, room: Room) -> str:
    return "the host is cordoned" if room.cordoned else ""


def _storage(need: Need, room: Room) -> str:
    return "" if need.host in ("", room.host) else f"the image is on {need.host}"


def _arch(need: Need, room: Room) -> str:
    return "" if not need.arch or need.arch == room.arch else f"needs {need.arch}, the host is {room.arch or 'unknown'}"


def _memory(need: Need, room: Room) -> str:
    wanted = need.memory + room.overhead
    if wanted > room.free:
        return f"needs {amount(wanted)}, {amount(room.free)} free"
    own = need.reserve + room.overhead
    return "" if own <= room.unreserved else f"reserves {amount(own)}, {amount(room.unreserved)} not reserved"


def _disk(_need: Need, room: Room) -> str:
    if room.disk_free is None or room.disk_free >= DISK_FLOOR:
        return ""
    return f"needs {amount(DISK_FLOOR)} free, {amount(room.disk_free)} free"


FILTERS: tuple[tuple[str, Callable[[Need, Room], str]], ...] = (
    ("ready", _ready),
    ("cordon", _cordon),
    ("storage", _storage),
    ("arch", _arch),
    ("memory", _memory),
    ("disk", _disk),
)
"""In order; the first that refuses is the one that is told."""


def judge(need: Need, room: Room) -> Verdict:
    """Filter and score one host. The score is the share of its memory that stays free: VMs spread, so that one host's
    end takes as few of them as possible."""
    for name, refuses in FILTERS:
        reason = refuses(need, room)
        if reason:
            return Verdict(room.host, False, name, f"{name}: {reason}")
    left = room.free - need.memory - room.overhead
    return Verdict(room.host, True, score=round(left / max(1, room.memory), 6))


def explain(need: Need, hosts: Iterable[Room]) -> list[Verdict]:
    """A verdict for every host: those that fit first, best first; equal ones by name, so that runs repeat exactly."""
    return sorted((judge(need, room) for room in hosts), key=lambda v: (not v.fits, -v.score, v.host))


def choose(need: Need, hosts: Iterable[Room]) -> tuple[str | None, list[Verdict]]:
    """The best host or None, and the whole table."""
    table = explain(need, hosts)
    return (table[0].host if table and table[0].fits else None), table


def sentence(table: list[Verdict], *, most: int = 3) -> str:
    """One line that says why nothing fits: ``no host can take it: big: memory: needs 2.1 GiB, 1.4 GiB free``."""
    if not table:
        return "no host can take it: there is no host"
    told = "; ".join(f"{v.host}: {v.reason}" for v in table[:most])
    more = len(table) - most
    return f"no host can take it: {told}" + (f"; and {more} more" if more > 0 else "")


def amount(count: int) -> str:
    """Bytes in a sentence: ``2.1 GiB``, ``900 MiB``."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
