"""One step of the governor: measure, decide, set what changed, and say when to look again.

Asleep (a look every second) while nobody is hungry; every 250 ms while somebody is, every 50 ms while every core is
wanted; every 20 ms only while no assignment to cores serves the hungry threads exactly, and every 10 ms for a moment
to put right what went wrong with one that does. All of it slows down as long as it costs more than :data:`MOST_COST`
of a core.
"""

from __future__ import annotations

import math

from corral.governor import burst
from corral.governor.entitle import Demand, Grant, entitlements
from corral.governor.protocol import Plan, Report, VmReport
from corral.governor.steering import LOOK_S, QUIET_TICK_S, Ran, Steering
from corral.governor.watched import Hands, Watched
from corral.scheduler.ramp import CPU_STEPS, ramp

ASLEEP_S = 1.0
DECIDE_S = 0.1
"""Entitlements are not computed again before. While threads are steered they are every :data:`LOOK_S`, which leaves
more for steering."""
REPORT_S = 1.0
MOST_COST = 0.03
"""Part of a core beyond which this process slows down; with a few guests it costs 2 to 3 % by itself. Less would save
little: caches are colder after a longer sleep, so that a step each 100 ms costs nearly as much as five each 20 ms."""
AFFORD_S = 1.0
SLOWEST, SLOWEST_TURNS = 20.0, 2.0
"""Time constant of its cost, and what its intervals are multiplied by at most. A turn that lasts for long is what
others wait, and a step of it costs little."""
REPAY_EVERY_S = 0.1
"""Weights follow deficits this often, between decisions too."""
HUNGRY = 0.95
"""A thread that ran, or waited to run, this part of the time wants a whole core."""
WAITING = 0.05
DROWSY, NOTICED_S = 0.1, 0.04
"""One that was hungry and is busy for less of the time, or was not and wants a whole core, is noticed after so long."""
LEAST_CAP = 0.01
"""Cores. No cap is lower, whatever a project's limit leaves: a guest must be able to shut down."""
TRIM, MOST_TRIM, MOST_SHORT = 0.03, 0.03, 0.1
"""The kernel hands out less than a quota, since CPUs keep what they do not use. At each look a quota is raised by the
first part of what was missing, by no more than the second in all; what is missing beyond the third has other reasons.
"""
QUOTA_STEP = 0.008
"""A change of a quota by less than this part is not worth it: each write gives its VM a new quota at once, so that ten
a second were measured to give it 14 % more than its cap. What writes that are worth it give is taken back by trimming.
"""
OVERDRAWN_S, PAID_S, PAYING = 0.3, 0.1, 0.8
"""Who had so much more than its share, seconds, is held to this part of it by a quota until it owes less than the
second. Where a VM has threads on several cores the kernel can starve those beside it for seconds, whatever they weigh.
"""
HEADROOM = 1.1
"""What a thread that is not hungry may want next: what it used and a tenth."""
CREDIT_S = 1.0
"""Deficits are forgotten beyond this: nobody hoards, and nobody pays for ever."""
REPAY_S = 0.3
"""Weights make up for deficits in about this time, on any assignment. The kernel's division of a core is off by up to a
fifth where other threads of a VM wake up often: it then forgets part of what waiting ones are owed. And beside other
programs a core of one's own helps little: the weight of all VMs together goes to the cores where they have most."""
MOST_REPAID = 0.5
"""Weights are changed by this part at most, so that those a dead governor leaves behind are still fair."""
CAPACITY_S = 2.0
LEAST_CAPACITY = 0.05
"""Cores. Time constant and floor of what the host has for VMs beside its other programs."""
SHORT = 0.02
STILL_SHORT = 0.005
"""Cores that VMs want beyond what the host has for them until threads are bound to cores, and until they are let go."""
WAITING_WEIGHT = 1e-3
"""Cores: the weight of one that waits for its turn."""


class Governor:
    """Steps of one host's governor. ``nodes``: NUMA node of each CPU; ``physical``: its physical core."""

    def __init__(self, hands: Hands, nodes: list[int], mode: str, physical: list[int] | None = None) -> None:
        self._hands, self._mode = hands, mode
        self._cores = len(nodes)
        self._vms: dict[str, Watched] = {}
        self._plan = Plan()
        self._last = self._decided_at = self._repaid_at = self._reported_at = hands.now()
        self._spent, self._slower = hands.busy_s(), 1.0
        self._steering = False
        self._cost = self._reported_cost = 0.0
        self._reported_idle = hands.idle_s()
        self._place = Steering(hands, nodes, physical, self._weigh)
        self._capacity = float(self._cores)
        self._looked, self._seen = hands.idle_s(), 0.0
        self._granted: tuple[object, list[Grant]] | None = None

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
                times = self._hands.times(vm.id)
                one = Watched(vm, self._hands.used_s(vm.id), times, self._hands.throttled_s(vm.id))
                one.hungry = [True] * len(one.times)  # it has just begun: it wants what it can get until it is seen
                self._vms[vm.id] = one
        self._seen += sum(vm.used for vm in self._vms.values()) - sum(vm.used for vm in known.values())
        self._decide(self._hands.now())

    def release(self) -> None:
        """Let every thread run anywhere; weights stay, they are fair by themselves."""
        self._steering = False
        self._place.release(list(self._vms.values()))

    def step(self) -> float:
        """Seconds until the next step."""
        began, spent = self._hands.now(), self._hands.busy_s()
        since = began - self._last
        every = LOOK_S * self._slower if self._steering else DECIDE_S
        due = began - self._decided_at >= every * 0.9
        if since > 0:
            self._charge(since, threads_only=self._place.by_turns and not due)
            self._afford((spent - self._spent) / since, since)
            self._last, self._spent = began, spent
        if due or self._noticed(since):
            self._decide(began)
        elif not self._place.by_turns and began - self._repaid_at >= REPAY_EVERY_S * 0.9:
            self._repay(began)
        wait = self._place.step(list(self._vms.values())) if self._steering else self._pause()
        return min(ASLEEP_S, wait * (min(SLOWEST_TURNS, self._slower) if self._place.by_turns else self._slower))

    def _afford(self, cost: float, since: float) -> None:
        """Go slower while this process costs more of a core than it may, and faster again. Not by the cost of single
        steps: a slow governor decides at every step, which makes each of them dear, and would stay slow."""
        keep = math.exp(-since / AFFORD_S)
        self._cost = keep * self._cost + (1 - keep) * cost
        self._slower = min(SLOWEST, max(1.0, self._slower * (1.03 if self._cost > MOST_COST else 0.97)))

    def _charge(self, since: float, *, threads_only: bool = False) -> None:
        """Charge what was used, credit what was due: entitlements of the hungry, scaled to what they got together.

        ``threads_only``: what vCPU threads used; the rest of each VM is charged at the next time without.
        """
        got: dict[str, float] = {}
        ran = Ran([0.0] * self._cores, [False] * self._cores)
        for id, vm in self._vms.items():
            used, times = vm.used, vm.times
            vm.times = self._hands.times(id)
            if threads_only:
                vm.used += sum(after.run - before.run for before, after in zip(times, vm.times, strict=True))
            else:
                vm.used = self._hands.used_s(id)
            got[id] = vm.used - used
            vm.saved = burst.save(vm.plan, vm.saved, got[id], since)
            for number, (before, after) in enumerate(zip(times, vm.times, strict=True)):
                vm.busy[number] = (after.run - before.run + after.wait - before.wait) / since
                if vm.core[number] >= 0:
                    ran.per_core[vm.core[number]] += after.run - before.run
                    ran.held[vm.core[number]] = True
        if self._steering:
            self._place.saw(ran, since)
        hungry = [vm for vm in self._vms.values() if any(vm.hungry)]
        due = sum(vm.grant.entitled for vm in hungry)
        total = sum(got[vm.plan.id] for vm in hungry)
        for vm in self._vms.values():
            vm.entitled_s += vm.grant.entitled * since
            if self._steering and any(vm.hungry) and due > 0:
                # What others took without having been seen to want it is borne by all, but not by reservations.
                reserved = min(vm.grant.entitled, vm.plan.reserve) * since
                vm.credit += max(reserved, vm.grant.entitled / due * total) - got[vm.plan.id]
                vm.credit = min(CREDIT_S, max(-CREDIT_S, vm.credit))
            else:
                vm.credit = 0.0
        if self._steering and due > 0:
            # What a sleeper is no longer owed is not held against those who had it: deficits add up to nothing.
            owed = sum(vm.credit for vm in hungry)
            for vm in hungry:
                vm.credit -= owed * vm.grant.entitled / due

    def _decide(self, now: float) -> None:
        """Who wants how much, and what follows for weights, caps, and whether threads are steered."""
        since = now - self._decided_at
        if since >= DECIDE_S * 0.9:
            self._look(since)
            self._decided_at = self._repaid_at = now
        demands = [Demand(vm.plan, self._wanted(vm), burst.most(vm.plan, vm.saved)) for vm in self._vms.values()]
        grants = self._grants(round(self._capacity, 2), demands)
        limited = {project.name for project in self._plan.projects if project.limit is not None}
        for vm, grant in zip(self._vms.values(), grants, strict=True):
            vm.grant = grant
            self._weigh(vm)
            self._hands.cap(vm.plan.id, self._cap(vm, limited))
        wanted = sum(min(vm.demand, burst.most(vm.plan, vm.saved)) for vm in self._vms.values())
        contended = wanted > self._capacity + (STILL_SHORT if self._steering else SHORT)
        if self._steering and not contended:
            self.release()
        self._steering = contended
        if contended:
            for vm in self._vms.values():
                if vm.waits and not any(vm.hungry):  # it is in nobody's way, and must be served when it wakes up
                    vm.waits = False
                    self._weigh(vm)
                for number, hungry in enumerate(vm.hungry):
                    if not hungry:
                        self._place.unpin(vm, number)

    def _grants(self, capacity: float, demands: list[Demand]) -> list[Grant]:
        """As before, while nobody wants anything else."""
        asked = (capacity, demands, self._plan.projects)
        if self._granted is None or self._granted[0] != asked:
            self._granted = (asked, entitlements(capacity, demands, self._plan.projects))
        return self._granted[1]

    def _repay(self, now: float) -> None:
        """Between two decisions: weights that follow deficits."""
        self._repaid_at = now
        for vm in self._vms.values():
            self._weigh(vm)

    def _noticed(self, since: float) -> bool:
        """Whether somebody fell asleep or woke up in the middle of two looks. Who is hungry is known then.

        Who waits for a turn is not judged, here or at looks: it may be blocked by another thread of its own VM that
        waits too, and what it owes or is owed would be forgotten. Should it sleep, its turn will show that.
        """
        found = False
        for vm in self._vms.values():
            for number, (hungry, busy) in enumerate(zip(vm.hungry, vm.busy, strict=True)):
                if hungry:
                    unlike = not vm.waits and busy < DROWSY and not self._hands.runnable(vm.plan.id, number)
                else:
                    unlike = busy >= HUNGRY
                vm.unlike[number] = vm.unlike[number] + since if unlike else 0.0
                if vm.unlike[number] < NOTICED_S:
                    continue
                found, vm.unlike[number], vm.hungry[number] = True, 0.0, not hungry
                vm.demand = min(len(vm.times), max(0.0, vm.demand + (1.0 if vm.hungry[number] else busy - 1.0)))
                vm.decided = (vm.used, vm.times, vm.throttled)
        return found

    def _look(self, since: float) -> None:
        """Who is hungry since the last look, and what there is for VMs: what they used, and what nobody did."""
        total, idle = sum(vm.used for vm in self._vms.values()), self._hands.idle_s()
        used, self._seen = total - self._seen, total
        had, self._looked = (used + idle - self._looked) / since, idle
        keep = math.exp(-since / CAPACITY_S)
        self._capacity = keep * self._capacity + (1 - keep) * min(float(self._cores), max(LEAST_CAPACITY, had))
        for vm in self._vms.values():
            _, before, throttled = vm.decided
            if vm.cap < len(vm.times):
                vm.throttled = self._hands.throttled_s(vm.plan.id)
            held = vm.throttled - throttled > 0.01 * since
            vm.trim = self._trim(vm, (vm.used - vm.decided[0]) / since) if held else 0.0
            vm.decided = (vm.used, vm.times, vm.throttled)
            demand = 0.0
            for number, (then, now) in enumerate(zip(before, vm.times, strict=True)):
                run, wait = (now.run - then.run) / since, (now.wait - then.wait) / since
                eager = run + wait >= HUNGRY or wait > WAITING or held
                # The kernel counts a wait when it ends: one that is longer than this look has left no trace yet.
                still = vm.hungry[number] and (vm.waits or self._hands.runnable(vm.plan.id, number))
                vm.hungry[number] = eager or still
                demand += 1.0 if vm.hungry[number] else min(1.0, HEADROOM * (run + wait))
            vm.demand = demand

    def _trim(self, vm: Watched, used: float) -> float:
        """The next one, of a VM that its cap held up. Who has much less than its cap wanted no more on average, and
        beside others who want the cores too a cap says nothing about what it has."""
        short = 1.0 - used / vm.cap
        if self._steering or abs(short) > MOST_SHORT:
            return vm.trim * (1.0 - TRIM)
        return min(MOST_TRIM, max(-MOST_SHORT, vm.trim + TRIM * short))

    def _wanted(self, vm: Watched) -> float:
        """To a hundredth: who uses about the same as before wants the same."""
        return float(len(vm.times)) if not vm.demand and any(vm.hungry) else round(vm.demand, 2)

    def _weigh(self, vm: Watched) -> None:
        self._hands.weight(vm.plan.id, self._weight(vm))

    def _weight(self, vm: Watched) -> float:
        """What it can count on, or has anyhow (where there is enough, weights that differ by far would mislead the
        kernel's balance of cores), and what it is owed."""
        granted = max(vm.grant.granted, vm.grant.entitled)
        if vm.waits:
            return WAITING_WEIGHT
        if self._place.by_turns or not (self._steering and any(vm.hungry)):
            return granted
        repaid = vm.credit / REPAY_S
        return granted + min(MOST_REPAID * granted, max(-MOST_REPAID * granted, repaid))

    def _cap(self, vm: Watched, limited: set[str]) -> float | None:
        """Its own limit and what it saved; in a project that has a limit together, its part of that. It grows by
        steps, so that a guest whose limit is lifted sees no cliff."""
        whole = float(len(vm.times))
        most = burst.most(vm.plan, vm.saved)
        if vm.plan.project in limited:
            most = min(most, vm.grant.entitled if any(vm.hungry) else vm.grant.granted)
        vm.cap = max(LEAST_CAP, ramp(vm.cap, most, whole, CPU_STEPS))
        quota = vm.cap * (1.0 + vm.trim)
        if abs(quota - vm.quota) > QUOTA_STEP * vm.quota:
            vm.quota = quota
        vm.held_back = self._steering and any(vm.hungry) and vm.credit < -(PAID_S if vm.held_back else OVERDRAWN_S)
        if vm.held_back:
            return max(LEAST_CAP, min(vm.quota, round(PAYING * vm.grant.entitled, 2)))
        return vm.quota if vm.cap < whole else None

    def _pause(self) -> float:
        hungry = sum(sum(vm.hungry) for vm in self._vms.values())
        if hungry >= self._cores:  # one more, and there is not enough
            return QUIET_TICK_S
        return LOOK_S if hungry else ASLEEP_S

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
                    saved=vm.saved, throttled=(vm.throttled - throttled) / since,
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
