"""One step of the governor: measure, decide, set what changed, and say when to look again.

Asleep (a look every second) while nobody is hungry; every 250 ms while somebody is; every 20 ms only while the hungry
threads need more than there is *and* no assignment to cores serves them exactly. A step that costs more than
:data:`MOST_COST` of its interval stretches the interval.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from corral.governor.entitle import Demand, Grant, entitlements
from corral.governor.meter import Times
from corral.governor.protocol import Plan, Report, VmPlan, VmReport
from corral.scheduler.shares.steer import Cores, Threads, drift, pack, settle, steer

TICK_S = 0.02
QUIET_TICK_S = 0.1
"""Steering, but the present assignment is exact and nobody is owed anything worth a move."""
LOOK_S = 0.25
ASLEEP_S = 1.0
DECIDE_S = 0.1
"""Entitlements are computed again this often while somebody is hungry."""
REPORT_S = 1.0
MOST_COST = 0.02
HUNGRY = 0.95
"""A thread that ran, or waited to run, this part of the time wants a whole core."""
WAITING = 0.05
LEAST_CAP = 0.01
"""Cores. No cap is lower, whatever a project's limit leaves: a guest must be able to shut down."""
HEADROOM = 1.1
"""What a thread that is not hungry may want next: what it used and a tenth."""
CREDIT_S = 1.0
"""Deficits are forgotten beyond this: nobody hoards, and nobody pays for ever."""
EXACT = 0.004
"""An assignment that serves everybody this exactly needs no steering: weights on one core are off by 0.7 %."""
TOLERATED = 0.01
"""A thread may drift from what it is entitled to by this part of a second until the next tick."""
REPAY_S = 0.3
"""While an assignment is exact, weights make up for deficits in about this time. The kernel's division of a core is off
by up to a fifth where other threads of a VM wake up often: it then forgets part of what waiting ones are owed."""
MOST_REPAID = 0.5
"""Weights are changed by this part at most, so that those a dead governor leaves behind are still fair."""
CAPACITY_S = 2.0
LEAST_CAPACITY = 0.05
"""Cores. Time constant and floor of what the host has for VMs beside its other programs."""
SMOOTH_S = 0.5
"""Time constant of what a core has for VMs (the rest is other programs')."""


class Hands(Protocol):
    """What the governor touches on its host. CPUs are indices from 0."""

    def now(self) -> float: ...
    def busy_s(self) -> float:
        """CPU seconds that this process has used."""
        ...

    def idle_s(self) -> float: ...
    def used_s(self, id: str) -> float: ...
    def throttled_s(self, id: str) -> float: ...
    def times(self, id: str) -> list[Times]:
        """Of each vCPU thread."""
        ...

    def runnable(self, id: str, thread: int) -> bool:
        """A vCPU thread (by its number) runs or waits to run at this moment."""
        ...

    def pin(self, id: str, thread: int, cpu: int | None) -> None:
        """Bind a vCPU thread (by its number) to a CPU, or let it run anywhere."""
        ...

    def weight(self, id: str, cores: float) -> None: ...
    def cap(self, id: str, cores: float | None) -> None: ...


class Watched:
    """A VM as the governor sees it, between two steps."""

    def __init__(self, plan: VmPlan, used: float, times: list[Times], throttled: float) -> None:
        self.plan = plan
        self.used, self.times, self.throttled = used, times, throttled
        self.core = [-1] * len(times)
        self.hungry = [False] * len(times)
        self.demand = 0.0
        self.credit = 0.0
        """Deficit: what it was entitled to and did not get, seconds."""
        self.grant = Grant(0.0, 0.0)
        self.decided = (used, times, throttled)
        """The counters at the last decision."""
        self.reported = (used, sum(t.wait for t in times), throttled)
        self.entitled_s = 0.0


class Governor:
    """Steps of one host's governor. ``nodes``: NUMA node of each CPU."""

    def __init__(self, hands: Hands, nodes: list[int], mode: str) -> None:
        self._hands, self._mode = hands, mode
        self._nodes = np.array(nodes)
        self._cores = len(nodes)
        self._vms: dict[str, Watched] = {}
        self._plan = Plan()
        self._available = np.ones(self._cores)
        self._last = self._decided_at = self._reported_at = hands.now()
        self._steering = False
        self._idle = self._cost = self._reported_cost = 0.0
        self._reported_idle = hands.idle_s()
        self._exact = False
        self._capacity = float(self._cores)
        self._looked = hands.idle_s()
        self._packed: tuple[object, Cores, float] | None = None

    def follow(self, plan: Plan) -> None:
        """Govern these VMs from now on; those that are no longer named are left as they are (their process is gone)."""
        known, self._plan = self._vms, plan
        self._vms = {}
        for vm in plan.vms:
            before = known.get(vm.id)
            if before is not None and (before.plan.pid, before.plan.threads) == (vm.pid, vm.threads):
                before.plan = vm
                self._vms[vm.id] = before
            else:
                one = Watched(vm, *self._read(vm.id))
                one.hungry = [True] * len(one.times)  # it has just begun: it wants what it can get until it is seen
                self._vms[vm.id] = one
        self._decide(self._hands.now())

    def release(self) -> None:
        """Let every thread run anywhere; weights stay, they are fair by themselves."""
        self._steering = False
        for vm in self._vms.values():
            self._unpin(vm)

    def step(self) -> float:
        """Seconds until the next step."""
        began, spent = self._hands.now(), self._hands.busy_s()
        since = began - self._last
        if since > 0:
            self._charge(since)
            self._last = began
        if began - self._decided_at >= DECIDE_S * 0.9:
            self._decide(began)
        wait = self._steer() if self._steering else self._pause()
        cost = self._hands.busy_s() - spent
        self._cost = 0.9 * self._cost + 0.1 * cost if self._cost else cost
        return max(wait, self._cost / MOST_COST)

    def _read(self, id: str) -> tuple[float, list[Times], float]:
        return self._hands.used_s(id), self._hands.times(id), self._hands.throttled_s(id)

    def _charge(self, since: float) -> None:
        """Charge what was used, credit what was due: entitlements of the hungry, scaled to what they got together."""
        got: dict[str, float] = {}
        per_core = np.zeros(self._cores)
        held = np.zeros(self._cores, dtype=bool)
        for id, vm in self._vms.items():
            used, times, _ = vm.used, vm.times, vm.throttled
            vm.used, vm.times, vm.throttled = self._read(id)
            got[id] = vm.used - used
            for number, (before, after) in enumerate(zip(times, vm.times, strict=True)):
                if vm.core[number] >= 0:
                    per_core[vm.core[number]] += after.run - before.run
                    held[vm.core[number]] = True
        if self._steering:
            keep = np.exp(-since / SMOOTH_S)
            seen = np.clip(per_core / since, 0.05, 1.0)
            self._available = np.where(held, keep * self._available + (1 - keep) * seen, 1.0)
        hungry = [vm for vm in self._vms.values() if any(vm.hungry)]
        due = sum(vm.grant.entitled for vm in hungry)
        total = sum(got[vm.plan.id] for vm in hungry)
        for vm in self._vms.values():
            vm.entitled_s += vm.grant.entitled * since
            if self._steering and any(vm.hungry) and due > 0:
                vm.credit += vm.grant.entitled / due * total - got[vm.plan.id]
                vm.credit = min(CREDIT_S, max(-CREDIT_S, vm.credit))
            else:
                vm.credit = 0.0

    def _decide(self, now: float) -> None:
        """Who wants how much, and what follows for weights, caps, and whether threads are steered."""
        since = now - self._decided_at
        if since >= DECIDE_S * 0.9:
            self._look(since)
            self._decided_at = now
        demands = [Demand(vm.plan, self._wanted(vm), self._most(vm)) for vm in self._vms.values()]
        grants = entitlements(self._capacity, demands, self._plan.projects)
        limited = {project.name for project in self._plan.projects if project.limit is not None}
        for vm, grant in zip(self._vms.values(), grants, strict=True):
            vm.grant = grant
            self._hands.weight(vm.plan.id, self._weight(vm))
            self._hands.cap(vm.plan.id, self._cap(vm, limited))
        contended = sum(min(vm.demand, self._most(vm)) for vm in self._vms.values()) > self._cores + 0.02
        if self._steering and not contended:
            self.release()
        self._steering = contended
        if contended:
            for vm in self._vms.values():
                for number, hungry in enumerate(vm.hungry):
                    if not hungry and vm.core[number] >= 0:
                        vm.core[number] = -1
                        self._hands.pin(vm.plan.id, number, None)

    def _look(self, since: float) -> None:
        """Who is hungry since the last look, and what there is for VMs: what they used, and what nobody did."""
        used, idle = sum(vm.used - vm.decided[0] for vm in self._vms.values()), self._hands.idle_s()
        had, self._looked = (used + idle - self._looked) / since, idle
        keep = float(np.exp(-since / CAPACITY_S))
        self._capacity = keep * self._capacity + (1 - keep) * min(float(self._cores), max(LEAST_CAPACITY, had))
        for vm in self._vms.values():
            _, before, throttled = vm.decided
            vm.decided = (vm.used, vm.times, vm.throttled)
            held = vm.throttled - throttled > 0.01 * since
            demand = 0.0
            for number, (then, now) in enumerate(zip(before, vm.times, strict=True)):
                run, wait = (now.run - then.run) / since, (now.wait - then.wait) / since
                eager = run + wait >= HUNGRY or wait > WAITING or held
                # The kernel counts a wait when it ends: one that is longer than this look has left no trace yet.
                vm.hungry[number] = eager or (vm.hungry[number] and self._hands.runnable(vm.plan.id, number))
                demand += 1.0 if vm.hungry[number] else min(1.0, HEADROOM * (run + wait))
            vm.demand = demand

    def _wanted(self, vm: Watched) -> float:
        return float(len(vm.times)) if not vm.demand and any(vm.hungry) else vm.demand

    def _most(self, vm: Watched) -> float:
        return float(len(vm.times)) if vm.plan.limit is None else min(vm.plan.limit, float(len(vm.times)))

    def _weight(self, vm: Watched) -> float:
        """What it can count on, and what it is owed."""
        granted = vm.grant.granted
        if not (self._steering and self._exact and any(vm.hungry)):
            return granted
        repaid = vm.credit / REPAY_S
        return granted + min(MOST_REPAID * granted, max(-MOST_REPAID * granted, repaid))

    def _cap(self, vm: Watched, limited: set[str]) -> float | None:
        """Its own limit; in a project that has one together, its part of that."""
        most = self._most(vm)
        if vm.plan.project in limited:
            most = min(most, vm.grant.entitled if any(vm.hungry) else vm.grant.granted)
        return max(most, LEAST_CAP) if most < len(vm.times) else None

    def _steer(self) -> float:
        """Move threads where it is worth it."""
        who = [(vm, n) for vm in self._vms.values() for n, hungry in enumerate(vm.hungry) if hungry]
        if not who:
            return LOOK_S
        number = {vm.plan.id: k for k, vm in enumerate(self._vms.values())}
        parts = np.array([sum(vm.hungry) for vm, _ in who], dtype=float)
        entitled = np.clip(np.array([vm.grant.entitled for vm, _ in who]) / parts, 1e-6, 1.0)
        owed = np.array([vm.credit for vm, _ in who]) / parts
        siblings = np.array([number[vm.plan.id] for vm, _ in who])
        core = np.array([vm.core[n] for vm, n in who])
        placed = settle(entitled, core, np.ones(self._cores), siblings)
        threads = Threads(entitled, owed, placed, siblings)
        best, uneven = self._pack(threads)
        self._exact = uneven < EXACT
        tick = QUIET_TICK_S if self._exact else min(QUIET_TICK_S, max(TICK_S, TOLERATED / uneven))
        if self._exact:
            chosen = steer(threads._replace(core=best), self._available, tick, self._nodes, whole=True)
        else:
            chosen = steer(threads, self._available, tick, self._nodes)
        for (vm, n), before, after in zip(who, core, chosen, strict=True):
            if before != after:
                vm.core[n] = int(after)
                self._hands.pin(vm.plan.id, n, int(after))
        return tick

    def _pack(self, threads: Threads) -> tuple[Cores, float]:
        """The best lasting assignment, and how unevenly it serves; computed again when who is hungry changes."""
        parts = threads.entitled / threads.entitled.sum()
        asked = (tuple(threads.siblings), tuple(np.round(parts, 2)))
        if self._packed is None or self._packed[0] != asked:
            best = pack(threads, self._nodes)
            self._packed = (asked, best, drift(threads.entitled, best, np.ones(self._cores)))
        elif self._exact:  # whole cores may have been exchanged since
            return threads.core, self._packed[2]
        return self._packed[1], self._packed[2]

    def _pause(self) -> float:
        return LOOK_S if any(any(vm.hungry) for vm in self._vms.values()) else ASLEEP_S

    def _unpin(self, vm: Watched) -> None:
        for number, core in enumerate(vm.core):
            if core >= 0:
                vm.core[number] = -1
                self._hands.pin(vm.plan.id, number, None)

    def due(self) -> bool:
        """A report is due."""
        return self._hands.now() - self._reported_at >= REPORT_S

    def report(self) -> Report:
        """What was since the last report."""
        now = self._hands.now()
        since = max(1e-6, now - self._reported_at)
        idle, cost = self._hands.idle_s(), self._hands.busy_s()
        rows = []
        for vm in self._vms.values():
            used, waited, throttled = vm.reported
            wait = sum(t.wait for t in vm.times)
            rows.append(
                VmReport(
                    id=vm.plan.id, entitled=vm.entitled_s / since, granted=vm.grant.granted,
                    used=(vm.used - used) / since, demand=vm.demand, wait=(wait - waited) / since, credit=vm.credit,
                    throttled=(vm.throttled - throttled) / since,
                )
            )  # fmt: skip
            vm.reported, vm.entitled_s = (vm.used, wait, vm.throttled), 0.0
        idling = (idle - self._reported_idle) / since
        used = sum(row.used for row in rows)
        report = Report(
            at=now, period_s=since, cores=self._cores, idle=max(0.0, idling),
            foreign=max(0.0, self._cores - idling - used), cost=(cost - self._reported_cost) / since,
            mode=self._mode, steering=self._steering, vms=tuple(rows),
        )  # fmt: skip
        self._reported_at, self._reported_idle, self._reported_cost = now, idle, cost
        return report
