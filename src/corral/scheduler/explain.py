"""Why is a VM slow? From its record and what was measured to sentences with numbers, each with what to do about it.

Rules look at one thing each and are asked in order; all that apply are told, those that hold the VM back first. Only
when none does, it is said that the platform is not the reason: that is an answer too. Numbers should be averages of
some seconds (``Usage.host.period_s``), one second says little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

from corral.model import Phase, Vm
from corral.model.base import Struct
from corral.model.usage import CpuUsage, ProjectUsage, Usage, VmUsage
from corral.units import format_size

TRIFLE = 0.05
"""Cores. Waiting or foreign load below this is everyday life."""
ROOT = "root"
"""The drive that the limits of a VM's record are about."""
REACHED = 0.9
"""The same of a drive's limits, which are met in bursts of some requests."""
NEAR = 0.95
"""A limit is reached by whoever uses this part of it: caps and throttles are met from below."""
MISSED = 0.9
"""Below this part of its entitlement a VM that wants more has been denied something."""
IDLE = 0.05
"""A VM that uses less than this part of a core is idle, to the eye."""
TIGHT = 0.8
"""A guest that uses this part of what it may has hardly room for caches; balloons leave a margin of a sixteenth."""
FULL = 0.05
"""A host with less than this part of its memory available is about to swap."""
TOLD = 3
"""Neighbours named in a sentence."""


class Effect(StrEnum):
    """What a finding means for the VM."""

    LIMITS = "limits"
    """This holds it back now."""
    SLOWS = "slows"
    """All it does takes longer, whatever it does."""
    FINE = "fine"
    """This is not the reason."""


class Finding(Struct, frozen=True, kw_only=True):
    """One answer. ``code`` is stable, for programs; ``hint`` may be empty."""

    code: str
    effect: Effect
    message: str
    hint: str = ""


class Case(NamedTuple):
    """What the rules look at: the record, what is measured of the VM (None: it has no process here), and of all."""

    vm: Vm
    row: VmUsage | None
    usage: Usage

    @property
    def cpu(self) -> CpuUsage | None:
        """Measured CPU time; None while nobody measures."""
        return self.row.cpu if self.row is not None and self.row.cpu.used is not None else None

    @property
    def project(self) -> ProjectUsage | None:
        return next((one for one in self.usage.projects if one.name == self.vm.meta.project), None)

    @property
    def waits(self) -> float:
        """Cores that its threads waited for although no limit held them (the kernel counts both as waiting)."""
        cpu = self.cpu
        return 0.0 if cpu is None else max(0.0, (cpu.wait or 0.0) - (cpu.throttled or 0.0))

    @property
    def capped(self) -> bool:
        """It has all that its own limit allows: nobody else takes anything from it, however long its threads wait."""
        limit, cpu = self.vm.spec.cpu.limit, self.cpu
        return limit is not None and cpu is not None and not self.bursts and (cpu.used or 0.0) >= MISSED * limit

    @property
    def bursts(self) -> bool:
        """It has savings, which it may spend above its limit."""
        return self.cpu is not None and (self.cpu.saved or 0.0) > 0.0

    @property
    def hungry(self) -> bool:
        """It waits for what others have."""
        return self.waits >= TRIFLE and not self.capped


def explain(vm: Vm, usage: Usage) -> tuple[Finding, ...]:
    """Everything worth saying, what holds the VM back first; never nothing."""
    row = next((one for one in usage.vms if one.id == vm.meta.id), None)
    case = Case(vm, row, usage)
    if vm.status.phase not in (Phase.RUNNING, Phase.UNRESPONSIVE, Phase.STOPPING, Phase.STARTING):
        return tuple(_state(case))
    found = [finding for rule in RULES for finding in rule(case)]
    if not any(finding.effect is Effect.LIMITS for finding in found):
        found += _nothing(case)
    order = list(Effect)
    return tuple(sorted(found, key=lambda finding: order.index(finding.effect)))


def summary(vm: Vm, usage: Usage) -> str:
    """What it is doing, in a line."""
    case = Case(vm, next((one for one in usage.vms if one.id == vm.meta.id), None), usage)
    cpu, phase = case.cpu, vm.status.phase
    if cpu is None:
        return f"{vm.meta.name} is {phase}"
    seconds = f" over the last {usage.host.period_s:.0f} s" if (usage.host.period_s or 0.0) >= 2 else ""
    wanted = f", and waited for {case.waits:.2f}" if case.hungry else ""
    return f"{vm.meta.name} is {phase}: it used {cpu.used:.2f} of {_cpus(vm.spec.cpu.count)}{wanted}{seconds}"


def _limits(code: str, message: str, hint: str = "") -> Finding:
    return Finding(code=code, effect=Effect.LIMITS, message=message, hint=hint)


def _state(case: Case) -> Iterator[Finding]:
    vm = case.vm
    phase, name = vm.status.phase, vm.meta.name
    reason = f": {vm.status.reason}" if vm.status.reason else ""
    if phase is Phase.PAUSED:
        yield _limits("paused", f"it is paused{reason}", f"corral resume {name}")
    elif phase is Phase.UNRESPONSIVE:
        yield _limits("unresponsive", f"it does not answer{reason}", f"corral logs {name}; corral console {name}")
    elif phase is Phase.STARTING:
        yield _limits("starting", f"it is starting{reason}", f"corral logs {name} -f")
    elif phase is Phase.STOPPING:
        yield _limits("stopping", f"it is being stopped{reason}")
    elif phase is not Phase.RUNNING:
        hint = f"corral start {name}" if phase is Phase.STOPPED else ""
        yield _limits("not-running", f"it is {phase}, so nothing of it runs{reason}", hint)


def _failures(case: Case) -> Iterator[Finding]:
    count = case.vm.status.failures
    if count:
        times = "once" if count == 1 else f"{count} times in a row"
        text = f"it ended {times} without being asked to, and has begun anew"
        yield Finding(
            code="failing",
            effect=Effect.SLOWS,
            message=text,
            hint=f"corral logs {case.vm.meta.name}; corral event list",
        )


def _own_limit(case: Case) -> Iterator[Finding]:
    limit, cpu = case.vm.spec.cpu.limit, case.cpu
    if limit is None or limit >= case.vm.spec.cpu.count or cpu is None or cpu.used is None:
        return
    held = cpu.throttled or 0.0
    if held >= TRIFLE / 2 or (cpu.used >= NEAR * limit and not case.bursts):
        text = f"its own cpu.limit of {_cores(limit)} holds it back: it used {cpu.used:.2f}"
        text += f", and was held for {held:.2f} cores' time more" if held >= TRIFLE / 2 else ""
        yield _limits("cpu-limit", text, f"corral vm set {case.vm.meta.name} cpu.limit=none")


def _project_limit(case: Case) -> Iterator[Finding]:
    project, cpu = case.project, case.cpu
    if project is None or project.limit is None or project.used is None or cpu is None:
        return
    if project.used >= NEAR * project.limit and (case.hungry or (cpu.throttled or 0.0) >= TRIFLE / 2):
        text = f"its project {project.name} may use {_cores(project.limit)} together and used {project.used:.2f}"
        yield _limits("project-limit", text, f"corral project set {project.name} cpu_limit=none")


def _count(case: Case) -> Iterator[Finding]:
    cpu, spec = case.cpu, case.vm.spec.cpu
    if cpu is None or cpu.used is None or cpu.used < NEAR * spec.count or not (cpu.limit >= spec.count):
        return
    if spec.count >= case.usage.host.cores:
        return  # more CPUs than the host has cores would help nobody
    text = f"it uses all that its {_cpus(spec.count)} can: {cpu.used:.2f}"
    hint = f"if its programs can use more: corral vm set {case.vm.meta.name} cpu.count={spec.count + 1}, and a restart"
    yield _limits("cpu-count", text, hint)


def _rivals(case: Case) -> Iterator[Finding]:
    """Who has what it waits for: VMs, or programs of the host; who has more is told first."""
    found = [list(_neighbours(case)), list(_foreign(case))]
    others = sum(one.cpu.used or 0.0 for one in case.usage.vms if one.id != case.vm.meta.id)
    if (case.usage.host.foreign or 0.0) > others:
        found.reverse()
    yield from found[0] + found[1]


def _neighbours(case: Case) -> Iterator[Finding]:
    """Others who have what this one waits for: by weight, in its project and in others, and by reservation."""
    cpu = case.cpu
    if cpu is None or not case.hungry:
        return
    mine = case.vm.meta.project
    others = [one for one in case.usage.vms if one.id != case.vm.meta.id and (one.cpu.used or 0.0) >= TRIFLE]
    near = [one for one in others if one.project == mine]
    wanted, entitled, used = cpu.wanted or 0.0, cpu.entitled or 0.0, cpu.used or 0.0
    had = f"it wants {wanted:.2f} cores, is entitled to {entitled:.2f} and used {used:.2f}"
    if near:
        text = f"{had}: its cpu.weight is {cpu.weight}, and others want CPU time too: {_named(near)}"
        yield _limits("cpu-weight", text, f"corral vm set {case.vm.meta.name} cpu.weight={min(10000, 2 * cpu.weight)}")
    project = case.project
    busy = [one for one in case.usage.projects if one.name != mine and (one.used or 0.0) >= TRIFLE]
    if busy and project is not None:
        told = ", ".join(f"{one.name} (weight {one.weight}) used {one.used or 0.0:.2f}" for one in busy[:TOLD])
        text = f"its project {mine} (weight {project.weight}) shares the host with others: {told}"
        hint = f"corral project set {mine} cpu_weight={min(10000, 2 * project.weight)}"
        yield _limits("project-weight", text, hint)
    # By weight alone all would have the same for their weight: who has more has it by its reservation.
    level = 1.05 * entitled / cpu.weight
    reserved = [one for one in others if one.cpu.reserve > 0 and (one.cpu.entitled or 0.0) / one.cpu.weight > level]
    if reserved:
        told = ", ".join(
            f"{one.name} has {_cores(one.cpu.reserve)} reserved and used {one.cpu.used or 0.0:.2f}"
            for one in reserved[:TOLD]
        )
        hint = f"corral vm set {case.vm.meta.name} cpu.reserve=0.5"
        yield _limits("reservations", f"reservations of others come first: {told}", hint)


def _foreign(case: Case) -> Iterator[Finding]:
    host = case.usage.host
    if case.hungry and host.foreign is not None and host.foreign >= max(2 * TRIFLE, 0.05 * host.cores):
        text = f"other programs of {host.name} use {host.foreign:.2f} of its {_cores(host.cores)}"
        yield _limits(
            "foreign-load", text, "all VMs together weigh as much as one process on each core: stop the others"
        )


def _missed(case: Case) -> Iterator[Finding]:
    """It got less than its entitlement, and nobody else has it."""
    cpu, host = case.cpu, case.usage.host
    if cpu is None or cpu.used is None or cpu.entitled is None or not case.hungry:
        return
    if not host.shares:
        text = f"shares of CPU time cannot be enforced on {host.name}" + (f": {host.mode}" if host.mode else "")
        yield _limits("not-enforced", text, "corral doctor")
    elif cpu.used < MISSED * cpu.entitled and cpu.entitled - cpu.used >= TRIFLE:
        yield _limits("short", f"it used {cpu.used:.2f} of the {cpu.entitled:.2f} cores that it is entitled to")


def _emulated(case: Case) -> Iterator[Finding]:
    if (case.row.accelerator if case.row else case.vm.status.accelerator) == "tcg":
        text = "its CPUs are emulated in software (TCG): about ten times slower than hardware"
        yield Finding(code="emulated", effect=Effect.SLOWS, message=text, hint="corral doctor says why KVM is not used")


def _disks(case: Case) -> Iterator[Finding]:
    """Its disk's own limits, reached; and drives whose host cannot do what they ask."""
    name, limits = case.vm.meta.name, case.vm.spec.disk
    for disk in case.row.disks if case.row else ():
        if disk.failed:
            text = f"the host could not do {disk.failed} of the requests to its disk {disk.name}"
            yield Finding(
                code="disk-failing", effect=Effect.SLOWS, message=text, hint="corral event list; is the disk full?"
            )
        if disk.name != ROOT:
            continue
        moved = None if disk.read_rate is None else disk.read_rate + (disk.write_rate or 0.0)
        if _reached(disk.iops, limits.iops, limits.iops_burst):
            text = f"its disk's limit of {limits.iops} requests a second is reached: it made {disk.iops:.0f}"
            yield _limits("disk-iops", text, f"corral vm set {name} disk.root.iops=none")
        if _reached(moved, limits.bandwidth, limits.bandwidth_burst):
            limit, used = format_size(limits.bandwidth or 0), format_size(round(moved or 0))
            text = f"its disk's limit of {limit} a second is reached: it moved {used}"
            yield _limits("disk-bandwidth", text, f"corral vm set {name} disk.root.bandwidth=none")


def _reached(rate: float | None, limit: int | None, burst: int | None) -> bool:
    """Near the limit; or, where it is well above because it spends credit, near that of bursts."""
    if rate is None or limit is None:
        return False
    return rate >= REACHED * (burst if burst is not None and rate > limit * (2.0 - REACHED) else limit)


def _balloon(case: Case) -> Iterator[Finding]:
    """Memory that its balloon has taken, while its guest uses nearly all of the rest: only then does it hurt."""
    memory = case.row.memory if case.row else None
    if memory is None or memory.granted is None or memory.granted >= memory.size:
        return
    text = f"its balloon has part of its memory: it may use {format_size(memory.granted)} of {format_size(memory.size)}"
    used = memory.guest_used
    hint = f"corral vm set {case.vm.meta.name} memory.reserve={format_size(memory.size)}"
    if used is not None and used >= TIGHT * memory.granted:
        yield _limits("balloon", f"{text}, and uses {format_size(used)}", hint)
    else:
        yield Finding(code="balloon", effect=Effect.SLOWS, message=text, hint=hint)


def _host_memory(case: Case) -> Iterator[Finding]:
    host = case.usage.host
    if 0 <= host.memory_available < FULL * host.memory:
        left = f"{format_size(host.memory_available)} of {format_size(host.memory)}"
        text = f"{host.name} has only {left} memory available, and may be swapping"
        yield Finding(code="host-memory", effect=Effect.SLOWS, message=text, hint="corral top shows who holds it")


def _unmeasured(case: Case) -> Iterator[Finding]:
    if case.vm.status.phase is Phase.RUNNING and case.cpu is None:
        text = f"its CPU time is not measured on {case.usage.host.name} now"
        yield Finding(code="unmeasured", effect=Effect.SLOWS, message=text, hint="corral doctor; try again in a moment")


RULES: tuple[Callable[[Case], Iterable[Finding]], ...] = (
    _state, _failures, _own_limit, _project_limit, _count, _disks, _rivals, _missed, _balloon, _emulated, _host_memory,
    _unmeasured,
)  # fmt: skip
"""In the order in which their findings are told, among those of one effect."""


def _nothing(case: Case) -> Iterator[Finding]:
    """Nothing of the platform holds it back."""
    cpu = case.cpu
    if cpu is None or cpu.used is None:
        return
    look = f"look inside: corral exec {case.vm.meta.name} -- top -b -n 1"
    if cpu.used < IDLE:
        text = f"it used {cpu.used:.0%} of a core and waited for nothing: the platform does not limit it"
        yield Finding(code="idle", effect=Effect.FINE, message=text, hint=look)
    else:
        text = f"it had all the CPU time it asked for, {cpu.used:.2f} cores: the platform does not limit it"
        yield Finding(code="satisfied", effect=Effect.FINE, message=text, hint=look)


def _named(rows: list[VmUsage]) -> str:
    """The largest users: ``db (weight 300) used 1.00``."""
    rows = sorted(rows, key=lambda one: (-(one.cpu.used or 0.0), one.name))
    told = ", ".join(f"{one.name} (weight {one.cpu.weight}) used {one.cpu.used or 0.0:.2f}" for one in rows[:TOLD])
    more = len(rows) - TOLD
    return told + (f" and {more} more" if more > 0 else "")


def _cores(value: float) -> str:
    return f"{value:g} core" if value == 1 else f"{value:g} cores"


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"
