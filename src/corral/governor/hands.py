"""What the governor touches on a real host: kernel counters, cgroups, affinity; nice values where there are none."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from corral.errors import CorralError
from corral.governor.guardian import Guardian
from corral.governor.meter import IdleClock, ProcessClock, ThreadClock, Times
from corral.governor.protocol import Plan, VmPlan
from corral.host.cgroup import Groups
from corral.host.cgroup.files import Knob
from corral.runtime.clock import SystemClock

SAME = 0.005
"""A weight or cap that changes by less than this part is not worth a write."""
NICE_STEP = 1.25
"""The kernel's weight of a thread changes by this factor with each step of nice."""


class RealHands:
    """``groups``: cgroups of this host (:mod:`corral.host.cgroup`); None where none can be used."""

    def __init__(self, cpus: list[int], groups: Groups | None) -> None:
        self._cpus, self._groups = cpus, groups
        self._vms: dict[str, _Vm] = {}
        self._clock = SystemClock()
        self._guardian = Guardian()
        self._idle = IdleClock(cpus)

    def follow(self, plan: Plan) -> Plan:
        """Open what is to be read of these VMs; returns the plan without those whose process is gone."""
        wanted = {vm.id: vm for vm in plan.vms}
        for id, held in list(self._vms.items()):
            now = wanted.get(id)
            if now is None or (now.pid, now.threads) != (held.plan.pid, held.plan.threads):
                held.close()
                del self._vms[id]
        for id, vm in wanted.items():
            if id not in self._vms:
                with suppress(OSError):  # it has just ended: the next plan will not name it
                    self._vms[id] = _Vm(vm, self._groups)
        return Plan(vms=tuple(vm for vm in plan.vms if vm.id in self._vms), projects=plan.projects)

    def now(self) -> float:
        return self._clock.monotonic()

    def busy_s(self) -> float:
        return time.process_time()

    def idle_s(self) -> float:
        return self._idle.read()

    def used_s(self, id: str) -> float:
        vm = self._vms[id]
        return vm.process.read() if vm.meter is None else vm.meter.usage()

    def throttled_s(self, id: str) -> float:
        meter = self._vms[id].meter
        return 0.0 if meter is None else meter.throttled()

    def times(self, id: str) -> list[Times]:
        return [thread.read() for thread in self._vms[id].threads]

    def runnable(self, id: str, thread: int) -> bool:
        return self._vms[id].threads[thread].runnable()

    def pin(self, id: str, thread: int, cpu: int | None) -> None:
        """Also QEMU's main thread, with the first one: it works for the VM and would disturb others elsewhere."""
        cpus = self._cpus if cpu is None else [self._cpus[cpu]]
        vm = self._vms[id]
        with suppress(ProcessLookupError):
            os.sched_setaffinity(vm.threads[thread].tid, cpus)
            if thread == 0:
                os.sched_setaffinity(vm.plan.pid, cpus)

    def weight(self, id: str, cores: float) -> None:
        vm = self._vms[id]
        if vm.weight is not None and abs(cores - vm.weight) <= SAME * vm.weight:
            return
        vm.weight = cores
        if self._groups is not None and vm.knob is not None:
            with self._while_it_lives(id):
                vm.knob.write(self._groups.weight_text(cores))
        else:
            self._renice()

    def cap(self, id: str, cores: float | None) -> None:
        vm = self._vms[id]
        if self._groups is not None and cores != vm.cap:
            with self._while_it_lives(id):
                self._groups.cap(id, cores)
            vm.cap = cores

    def guard(self, weights: dict[str, float]) -> bool:
        if self._groups is None:
            return False
        files, threads = {}, []
        for id, cores in weights.items():
            vm = self._vms[id]
            if vm.knob is None:
                return False
            files[str(vm.knob.path)] = self._groups.weight_text(round(cores, 2))
            threads += [vm.plan.pid, *vm.plan.threads]
        return self._guardian.tell(files, threads, self._cpus)

    def relieve(self) -> None:
        self._guardian.relieve()

    def close(self) -> None:
        self._guardian.close()
        self._idle.close()

    @contextmanager
    def _while_it_lives(self, id: str) -> Iterator[None]:
        """A VM that ended a moment ago has no group any more; we are told of it soon."""
        try:
            yield
        except CorralError:
            if self._groups is None or id in self._groups.inventory():
                raise

    def _renice(self) -> None:
        """Without cgroups: the heaviest VM keeps nice 0, others step down from it. Only ever upwards: a plain user may
        not lower a nice value again, so a VM that was made lighter stays so until it is started again."""
        most = max(vm.weight or 0.0 for vm in self._vms.values())
        for vm in self._vms.values():
            step = min(19, max(0, round(math.log(most / max(vm.weight or most, 1e-6), NICE_STEP))))
            if step == vm.nice:
                continue
            with suppress(OSError):
                for thread in vm.threads:
                    os.setpriority(os.PRIO_PROCESS, thread.tid, step)
                vm.nice = step


class _Vm:
    """Open counters of one VM. Raises OSError when its process is gone."""

    def __init__(self, plan: VmPlan, groups: Groups | None) -> None:
        self.plan = plan
        self.meter = groups.meter(plan.id) if groups is not None else None
        file = groups.weight_file(plan.id) if groups is not None else None
        self.knob = Knob(file) if file is not None else None
        self.weight: float | None = None
        self.cap: float | None = math.nan
        """Not known before it is written: an earlier governor may have left one."""
        self.nice = 0
        self.process = ProcessClock(plan.pid)
        self.threads = [ThreadClock(plan.pid, tid) for tid in plan.threads]

    def close(self) -> None:
        self.process.close()
        if self.meter is not None:
            self.meter.close()
        if self.knob is not None:
            self.knob.close()
        for thread in self.threads:
            thread.close()
