"""Tells the governor which VMs run here, and what their records say of CPU time; looks every second, come what may."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import Governing
from corral.engine.protocol import Engine
from corral.errors import CorralError
from corral.governor.protocol import Plan, ProjectPlan, VmPlan
from corral.model import Phase, Project, Vm
from corral.model.vm import start_of
from corral.runtime import Runtime
from corral.store.objects import Objects

EVERY_S = 1.0
WITH_CPUS = (Phase.STARTING, Phase.RUNNING, Phase.PAUSED, Phase.STOPPING)
"""Phases in which a VM's threads are worth looking at; one that does not answer keeps what it was known to have."""
ARRIVING_CORES = 1.0
"""A fork weighs as much as a VM that is entitled to so many cores, until it is somebody: it has a fraction of a second
of work to do; where a hundred that came before it are still busy, its own share would make tens of seconds of that."""
ARRIVING_S = 5.0
"""At most so long after it was seen first: one that takes longer has what it is entitled to."""


class CpuGrants:
    """Run one per host. ``others``: machines without a VM's record that are governed too."""

    def __init__(
        self, objects: Objects, engine: Engine, picture: Picture, registration: Registration,
        governing: Governing, rt: Runtime, others: Callable[[], Awaitable[list[VmPlan]]] | None = None,
    ) -> None:  # fmt: skip
        self._others = others
        self._objects, self._engine, self._picture = objects, engine, picture
        self._registration, self._governing, self._rt = registration, governing, rt
        self._threads: dict[tuple[str, int], tuple[int, ...]] = {}
        self._arrived: dict[str, float] = {}

    async def run(self) -> None:
        """Keep the governor told, until cancelled."""
        told: Plan | None = None
        while True:
            plan = await self.plan()
            if plan != told:
                self._governing.follow(plan)
                told = plan
            await self._rt.clock.sleep(EVERY_S)

    async def plan(self) -> Plan:
        """The plan as of now."""
        here = [vm for id in sorted(self._picture.alive) if (vm := self._picture.vms.get(id)) is not None]
        here = [vm for vm in here if vm.status.host == self._registration.name and vm.status.pid is not None]
        self._arrived = {vm.meta.id: at for vm in here if (at := self._arrived.get(vm.meta.id)) is not None}
        here = [vm for vm in here if not self._arriving(vm)]
        self._threads = {key: value for key, value in self._threads.items() if key in {_key(vm) for vm in here}}
        await asyncio.gather(*(self._find(vm) for vm in here))
        vms = tuple(_vm_plan(vm, self._threads[_key(vm)]) for vm in here if self._threads.get(_key(vm)))
        vms += tuple(await self._others()) if self._others is not None else ()
        names = {vm.project for vm in vms}
        projects = (await self._objects.list(Project)).items if names else []
        return Plan(vms=vms, projects=tuple(_project_plan(one) for one in projects if one.meta.name in names))

    def _arriving(self, vm: Vm) -> bool:
        """It is a fork that is not somebody yet, and keeps the weight it was given when it was made."""
        start, id, now = start_of(vm), vm.meta.id, self._rt.clock.monotonic()
        if vm.status.phase is not Phase.STARTING or start.how != "fork" or start.done:
            return False
        return now - self._arrived.setdefault(id, now) < ARRIVING_S

    async def _find(self, vm: Vm) -> None:
        """Ask once for a process's threads: they stay the same as long as it lives."""
        if _key(vm) in self._threads or vm.status.phase not in WITH_CPUS:
            return
        try:
            self._threads[_key(vm)] = await self._engine.vcpus(vm.meta.id)
        except CorralError:
            return  # it has just ended, or does not answer: asked again at the next look


def _key(vm: Vm) -> tuple[str, int]:
    assert vm.status.pid is not None
    return vm.meta.id, vm.status.pid


def _vm_plan(vm: Vm, threads: tuple[int, ...]) -> VmPlan:
    cpu = vm.spec.cpu
    assert vm.status.pid is not None
    return VmPlan(
        id=vm.meta.id, project=vm.meta.project, pid=vm.status.pid, threads=threads,
        weight=float(cpu.weight), reserve=cpu.reserve, limit=cpu.limit, burst=cpu.burst,
    )  # fmt: skip


def _project_plan(project: Project) -> ProjectPlan:
    spec = project.spec
    return ProjectPlan(
        name=project.meta.name, weight=float(spec.cpu_weight), reserve=spec.cpu_reserve, limit=spec.cpu_limit
    )
