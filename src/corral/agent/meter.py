"""Who uses what here, when somebody asks: joins the records, the governor's last report and what processes hold.

Nothing runs while nobody looks. Answers are at most :data:`FRESH_S` old, so that many lookers cost as much as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from corral.agent.grants.accounts import Accounts, Sums
from corral.agent.grants.memory import Granted
from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import Joined
from corral.agent.traffic import Traffic, TrafficMeter
from corral.engine.protocol import Engine
from corral.governor.protocol import VmReport
from corral.model import Project, ProjectSpec, Vm
from corral.model.usage import CpuTotals, CpuUsage, HostUsage, MemoryUsage, ProjectUsage, Usage, VmUsage
from corral.runtime import Runtime
from corral.store.objects import Objects

FRESH_S = 0.5
"""Half of the governor's period: looking more often shows nothing new."""


RATE_S = 1.0
"""Between two looks that are made for the sake of rates."""


class Meter:
    """One per host."""

    def __init__(
        self, objects: Objects, picture: Picture, registration: Registration, joined: Joined, accounts: Accounts,
        engine: Engine, rt: Runtime, *, granted: Callable[[Vm], Granted | None],
    ) -> None:  # fmt: skip
        self._granted = granted
        self._objects, self._picture, self._registration = objects, picture, registration
        self._joined, self._accounts, self._rt = joined, accounts, rt
        self._traffic = TrafficMeter(engine, rt)
        self._last: tuple[float, Usage] | None = None
        self._one = asyncio.Lock()

    async def usage(self) -> Usage:
        """Usage as of now. Raises Unavailable when the store does not answer."""
        async with self._one:
            now = self._rt.clock.monotonic()
            if self._last is None or now - self._last[0] >= FRESH_S:
                self._last = now, await self._look()
            return self._last[1]

    async def lately(self) -> Usage:
        """:meth:`usage` with the CPU time of VMs over the last quarter of a minute, as far as it is known.

        One second says little about a guest, and nothing about why it is slow. Rates of drives need two looks: where
        nobody has looked before, the answer takes a second.
        """
        usage = await self.usage()
        if any(disk.read_rate is None for vm in usage.vms for disk in vm.disks):
            await self._rt.clock.sleep(RATE_S)
            usage = await self.usage()
        known = [recent for vm in usage.vms if (recent := self._accounts.lately(vm.id)) is not None]
        if not known:
            return usage
        host = msgspec.structs.replace(usage.host, period_s=max(recent.seconds for recent in known))
        vms = tuple(_averaged(vm, self._accounts.lately(vm.id)) for vm in usage.vms)
        projects = tuple(_summed(one, [vm for vm in vms if vm.project == one.name]) for one in usage.projects)
        return msgspec.structs.replace(usage, host=host, vms=vms, projects=projects)

    async def _look(self) -> Usage:
        here = [vm for id in self._picture.alive if (vm := self._picture.vms.get(id)) is not None]
        here = [vm for vm in here if vm.status.host == self._registration.name and vm.status.pid is not None]
        here.sort(key=lambda vm: (vm.meta.project, vm.meta.name))
        pids = [vm.status.pid for vm in here if vm.status.pid is not None]
        held, traffic = await asyncio.gather(self._joined.held(pids), self._traffic.look(here))
        report = self._joined.governing.report()
        said = {one.id: one for one in report.vms} if report else {}
        vms = tuple(
            _vm(vm, said.get(vm.meta.id), self._accounts.sums(vm.meta.id), _memory(vm, self._granted(vm), used), moved)
            for vm, used, moved in zip(here, held, traffic, strict=True)
        )
        specs = {one.meta.name: one.spec for one in (await self._objects.list(Project)).items} if vms else {}
        facts = self._joined.facts()
        host = HostUsage(
            name=self._registration.name, cores=report.cores if report else facts.cpus,
            memory=facts.memory, memory_available=facts.memory_available, shares=self._joined.groups.shares,
        )  # fmt: skip
        if report:
            host = msgspec.structs.replace(
                host, mode=report.mode, steering=report.steering, period_s=report.period_s, idle=report.idle,
                foreign=report.foreign, governor=report.cost,
            )  # fmt: skip
        names = sorted({vm.project for vm in vms})
        projects = tuple(
            _project(name, specs.get(name, ProjectSpec()), [vm for vm in vms if vm.project == name]) for name in names
        )
        return Usage(at=self._rt.clock.now(), host=host, vms=vms, projects=projects)


def _vm(vm: Vm, said: VmReport | None, sums: Sums | None, memory: MemoryUsage, moved: Traffic) -> VmUsage:
    spec = vm.spec.cpu
    cpu = CpuUsage(weight=spec.weight, reserve=spec.reserve, limit=_limit(vm), burst=spec.burst, total=_totals(sums))
    if said is not None:
        cpu = msgspec.structs.replace(
            cpu, entitled=said.entitled, granted=said.granted, used=said.used, wanted=said.demand, wait=said.wait,
            credit=said.credit, saved=said.saved, throttled=said.throttled,
        )  # fmt: skip
    return VmUsage(
        id=vm.meta.id, name=vm.meta.name, project=vm.meta.project, phase=vm.status.phase,
        accelerator=vm.status.accelerator, cpu=cpu, memory=memory, disks=moved.disks, nics=moved.nics,
    )  # fmt: skip


def _memory(vm: Vm, known: Granted | None, held: int | None) -> MemoryUsage:
    spec = vm.spec.memory
    if known is None:
        return MemoryUsage(size=spec.size, reserve=spec.reserve, used=held)
    return MemoryUsage(
        size=spec.size, reserve=spec.reserve, used=held, granted=known.granted, guest_used=known.used
    )  # fmt: skip


def _totals(sums: Sums | None) -> CpuTotals | None:
    if sums is None:
        return None
    return CpuTotals(entitled=sums.entitled, used=sums.used, wait=sums.wait, throttled=sums.throttled)


def _averaged(vm: VmUsage, recent: Sums | None) -> VmUsage:
    if recent is None:
        return vm
    cpu = msgspec.structs.replace(
        vm.cpu, entitled=recent.entitled, granted=recent.granted, used=recent.used, wanted=recent.wanted,
        wait=recent.wait, throttled=recent.throttled,
    )  # fmt: skip
    return msgspec.structs.replace(vm, cpu=cpu)


def _limit(vm: Vm) -> float:
    return float(vm.spec.cpu.count) if vm.spec.cpu.limit is None else vm.spec.cpu.limit


def _project(name: str, spec: ProjectSpec, vms: list[VmUsage]) -> ProjectUsage:
    project = ProjectUsage(
        name=name, weight=spec.cpu_weight, reserve=spec.cpu_reserve, limit=spec.cpu_limit, vms=len(vms),
        memory_size=sum(vm.memory.size for vm in vms), memory_used=_sum(vm.memory.used for vm in vms),
        disk_read=_sum(disk.read_rate for vm in vms for disk in vm.disks),
        disk_write=_sum(disk.write_rate for vm in vms for disk in vm.disks),
        disk_iops=_sum(disk.iops for vm in vms for disk in vm.disks),
        receive=_sum(nic.receive_rate for vm in vms for nic in vm.nics),
        send=_sum(nic.send_rate for vm in vms for nic in vm.nics),
    )  # fmt: skip
    return _summed(project, vms)


def _summed(project: ProjectUsage, vms: list[VmUsage]) -> ProjectUsage:
    """With the CPU time of its VMs."""
    return msgspec.structs.replace(
        project, entitled=_sum(vm.cpu.entitled for vm in vms), granted=_sum(vm.cpu.granted for vm in vms),
        used=_sum(vm.cpu.used for vm in vms),
    )  # fmt: skip


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
