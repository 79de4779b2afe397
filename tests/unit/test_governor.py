"""The governor's steps against a host that divides its cores as the kernel does: by weight on each core."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from corral.governor.entitle import Demand, entitlements
from corral.governor.loop import ASLEEP_S, Governor
from corral.governor.meter import Times
from corral.governor.protocol import Plan, ProjectPlan, VmPlan
from corral.governor.steering import QUIET_TICK_S

SLICE_S = 0.002


@dataclass
class Guest:
    busy: bool = True
    used: float = 0.0
    wait: float = 0.0
    throttled: float = 0.0
    weight: float = 1.0
    cap: float | None = None
    core: int | None = None


@dataclass
class Host:
    """Two cores; guests of one thread. Unbound threads stay where they were put first, as if nobody balanced."""

    guests: dict[str, Guest]
    time: float = 0.0
    idle: float = 0.0
    moves: int = 0
    others: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Part of each core that other programs take."""
    forgetful: str = ""
    """The kernel gives this guest a part of its part only, while others have weight on its core."""
    remembered: float = 1 / 3
    lost: float = 0.0
    """Part of each quota that is not handed out."""
    blocked: bool = False
    """Who weighs next to nothing does not even wait for a core, but for another thread of its own."""
    quotas: int = 0
    guardian: bool = True
    guarded: dict[str, float] = field(default_factory=dict)

    def run(self, seconds: float) -> None:
        """Let the time pass."""
        for _ in range(round(seconds / SLICE_S)):
            for core in (0, 1):
                here = [g for n, g in enumerate(self.guests.values()) if g.busy and self.place(n, g) == core]
                total = sum(self.counted(g) for g in here)
                self.idle += 0 if here else SLICE_S * (1.0 - self.others[core])
                for guest in here:
                    part = self.counted(guest) / total * (1.0 - self.others[core])
                    got = SLICE_S * min(part, guest.cap * (1.0 - self.lost) if guest.cap is not None else 1.0)
                    guest.throttled += SLICE_S * part - got
                    if guest.cap is None:  # what those with a cap leave is not lost
                        got += SLICE_S * sum(
                            max(0.0, self.counted(g) / total * (1.0 - self.others[core]) - (g.cap or 1.0)) for g in here
                        ) / sum(g.cap is None for g in here)  # fmt: skip
                    guest.used += got
                    guest.wait += 0.0 if self.blocked and guest.weight < 0.01 else SLICE_S - got
            self.time += SLICE_S

    def counted(self, guest: Guest) -> float:
        return guest.weight * (self.remembered if guest is self.guests.get(self.forgetful) else 1)

    def place(self, number: int, guest: Guest) -> int:
        return number % 2 if guest.core is None else guest.core

    def now(self) -> float:
        return self.time

    def busy_s(self) -> float:
        return 0.0

    def idle_s(self) -> float:
        return self.idle

    def used_s(self, id: str) -> float:
        return self.guests[id].used

    def throttled_s(self, id: str) -> float:
        return self.guests[id].throttled

    def times(self, id: str) -> list[Times]:
        return [Times(self.guests[id].used, self.guests[id].wait)]

    def runnable(self, id: str, thread: int) -> bool:
        guest = self.guests[id]
        return guest.busy and not (self.blocked and guest.weight < 0.01)

    def pin(self, id: str, thread: int, cpu: int | None) -> None:
        self.guests[id].core, self.moves = cpu, self.moves + 1

    def weight(self, id: str, cores: float) -> None:
        self.guests[id].weight = cores

    def cap(self, id: str, cores: float | None) -> None:
        self.quotas += self.guests[id].cap != cores
        self.guests[id].cap = cores

    def guard(self, weights: dict[str, float]) -> bool:
        self.guarded = weights
        return self.guardian

    def relieve(self) -> None:
        self.guarded = {}


def vm(id: str, **more: object) -> VmPlan:
    return VmPlan(id=id, project="default", pid=1, threads=(2,), **more)  # type: ignore[arg-type]


def governed(*vms: VmPlan, projects: tuple[ProjectPlan, ...] = ()) -> tuple[Host, Governor]:
    host = Host({one.id: Guest() for one in vms})
    governor = Governor(host, [0, 0], "a test")
    governor.follow(Plan(vms=vms, projects=projects))
    return host, governor


def go(host: Host, governor: Governor, seconds: float) -> dict[str, float]:
    """What each guest used in so many seconds under the governor, in cores."""
    before, until, began = {id: g.used for id, g in host.guests.items()}, host.time + seconds, host.time
    while host.time < until:
        host.run(governor.step())
    return {id: (g.used - before[id]) / (host.time - began) for id, g in host.guests.items()}


def saved(governor: Governor) -> float:
    return governor.report().vms[0].saved


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 2), (1, 2, 3, 4), (1, 1, 1, 1, 1)])
def test_busy_guests_get_by_weight_across_cores(weights: tuple[int, ...]) -> None:
    host, governor = governed(*(vm(f"v{n}", weight=100.0 * w) for n, w in enumerate(weights)))
    go(host, governor, 2.0)
    used = go(host, governor, 10.0)
    for id, weight in zip(used, weights, strict=True):
        assert used[id] == pytest.approx(2 * weight / sum(weights), rel=0.01)


def test_who_waits_for_a_turn_weighs_nothing_and_somebody_else_knows_what_it_should() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c", weight=200))
    governor.follow(Plan(vms=(vm("a"), vm("b"), vm("c"))))
    go(host, governor, 2.0)
    assert sorted(guest.weight > 0.1 for guest in host.guests.values()) == [False, True, True]
    assert list(host.guarded.values()) == pytest.approx([2 / 3] * 3, rel=0.01)
    governor.release()
    assert [guest.weight for guest in host.guests.values()] == pytest.approx([2 / 3] * 3, rel=0.01)
    assert host.guarded == {}


def test_a_core_that_gave_too_little_is_made_up_for_by_turns_and_then_the_packing_is_back() -> None:
    host, governor = governed(*(vm(f"v{n}", weight=100.0 * w) for n, w in enumerate((1, 2, 3, 4))))
    go(host, governor, 2.0)
    packed = [guest.core for guest in host.guests.values()]
    assert packed[0] == packed[3] != packed[1] == packed[2]
    assert host.guarded == {}, "weights are enough"
    before = {id: guest.used for id, guest in host.guests.items()}
    host.others[packed[0] or 0], turned = 0.9, 0
    for _ in range(20):  # as much as another program takes in a few hundred milliseconds
        host.run(governor.step())
        turned += bool(host.guarded)
    assert turned
    host.others = [0.0, 0.0]
    go(host, governor, 1.0)
    used = [guest.used - before[id] for id, guest in host.guests.items()]
    for got, weight in zip(used, (1, 2, 3, 4), strict=True):
        assert got == pytest.approx(sum(used) * weight / 10, abs=0.02)
    assert host.guarded == {}
    packed = [guest.core for guest in host.guests.values()]
    assert packed[0] == packed[3] != packed[1] == packed[2]


def test_a_core_that_is_not_divided_by_weight_is_divided_by_turns() -> None:
    host, governor = governed(*(vm(f"v{n}", weight=100.0 * w) for n, w in enumerate((1, 2, 3, 4))))
    go(host, governor, 2.0)
    host.forgetful = "v0"
    before = {id: guest.used for id, guest in host.guests.items()}
    go(host, governor, 1.0)
    assert host.guests["v0"].used - before["v0"] == pytest.approx(0.2, abs=0.02)


def test_nobody_starves_where_weights_and_turns_are_no_help() -> None:
    host, governor = governed(vm("v0"), vm("v1"), vm("v2", weight=200.0))
    host.guardian, host.forgetful, host.remembered = False, "v0", 1e-6
    go(host, governor, 3.0)
    assert go(host, governor, 10.0)["v0"] == pytest.approx(0.5, rel=0.1)
    host.forgetful = ""
    go(host, governor, 3.0)
    assert {guest.cap for guest in host.guests.values()} == {None}


def test_an_owner_that_falls_asleep_leaves_its_core_to_the_others_at_once() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"))
    go(host, governor, 2.0)
    # One of those two, since nobody balances unbound threads here: the others are on two cores then.
    owner = next(host.guests[id] for id in ("a", "c") if host.guests[id].weight > 0.1)
    owner.busy = False
    idle = host.idle
    go(host, governor, 1.0)
    assert host.idle - idle < 0.1
    owner.busy = True
    go(host, governor, 1.0)
    assert list(go(host, governor, 5.0).values()) == pytest.approx([2 / 3] * 3, rel=0.02)


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 2, 3)])
def test_who_is_blocked_while_it_waits_is_not_taken_for_asleep(weights: tuple[int, ...]) -> None:
    host, governor = governed(*(vm(f"v{n}", weight=100.0 * w) for n, w in enumerate(weights)))
    host.blocked = True
    go(host, governor, 2.0)
    used = go(host, governor, 10.0)
    for id, weight in zip(used, weights, strict=True):
        assert used[id] == pytest.approx(2 * weight / sum(weights), rel=0.01)


def test_who_falls_asleep_or_wakes_up_where_weights_divide_is_noticed_within_a_tenth_of_a_second() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c", weight=200))  # c has a core, a and b share one
    go(host, governor, 2.05)
    host.guests["c"].busy, idle = False, host.idle
    go(host, governor, 0.5)
    assert host.idle - idle < 0.11
    host.guests["c"].busy, before = True, host.guests["c"].used
    go(host, governor, 0.5)
    assert host.guests["c"].used - before > 0.39


def test_who_falls_asleep_while_it_waits_has_its_weight_when_it_wakes_up() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"), vm("d", weight=200))
    host.guests["d"].busy = False  # three take turns, and a fourth joins them for a moment
    go(host, governor, 2.0)
    host.guests["d"].busy = True
    for _ in range(1000):
        host.run(governor.step())
        if host.guests["d"].weight < 0.1:
            break
    assert host.guests["d"].weight < 0.1
    governor._vms["d"].hungry = [False]  # as the next look finds it
    governor._decide(host.time)
    assert host.guests["d"].weight > 0.1
    host.guests["d"].busy = False
    go(host, governor, 1.0)
    assert min(host.guests[name].weight for name in "abc") < 0.1, "turns go on"


def test_nobody_waits_for_a_turn_when_nobody_would_put_it_right() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"))
    host.guardian = False
    go(host, governor, 2.0)
    used = go(host, governor, 10.0)
    assert min(guest.weight for guest in host.guests.values()) > 0.3
    assert list(used.values()) == pytest.approx([2 / 3] * 3, rel=0.01)


def test_nobody_goes_on_waiting_when_who_would_put_it_right_is_gone() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"))
    go(host, governor, 2.0)
    assert min(guest.weight for guest in host.guests.values()) < 0.01
    host.guardian = False
    go(host, governor, 2.0)
    assert min(guest.weight for guest in host.guests.values()) > 0.3


def test_nobody_is_bound_while_there_is_enough() -> None:
    host, governor = governed(vm("a"), vm("b"))
    go(host, governor, 3.0)
    assert host.moves == 0
    assert governor.step() == QUIET_TICK_S


def test_it_sleeps_while_nobody_is_hungry() -> None:
    host, governor = governed(vm("a"))
    host.guests["a"].busy = False
    go(host, governor, 2.0)
    assert governor.step() == ASLEEP_S


def test_who_comes_back_has_its_share_within_two_seconds() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"))
    host.guests["c"].busy = False
    go(host, governor, 3.0)
    host.guests["c"].busy = True
    go(host, governor, 2.0)
    assert go(host, governor, 5.0)["c"] == pytest.approx(2 / 3, rel=0.02)


def test_a_reservation_holds_beside_heavy_neighbours() -> None:
    neighbours = [vm(f"n{n}", weight=10_000.0) for n in range(3)]
    host, governor = governed(vm("a", weight=1.0, reserve=0.5), *neighbours)
    go(host, governor, 2.0)
    assert go(host, governor, 10.0)["a"] == pytest.approx(0.5, rel=0.01)


def test_limits_become_caps_and_are_lifted_again() -> None:
    host, governor = governed(vm("a", limit=0.25))
    assert host.guests["a"].cap == 0.25
    governor.follow(Plan(vms=(vm("a"),)))
    caps = [host.guests["a"].cap]
    while caps[-1] is not None and len(caps) < 20:
        host.run(governor.step())
        caps.append(host.guests["a"].cap)
    assert list(dict.fromkeys(caps)) == [0.5, 0.75, None]  # a quarter of a core at each decision


def test_a_cap_is_what_a_guest_has_although_the_kernel_hands_out_less_than_a_quota() -> None:
    host, governor = governed(vm("a", limit=0.9))
    for host.lost in (0.02, 0.0):
        before = host.quotas
        go(host, governor, 40.0)
        assert go(host, governor, 5.0)["a"] == pytest.approx(0.9, rel=0.006)
        assert host.quotas - before < 10, "each write gives it a new quota at once"


def test_a_plan_saves_below_its_limit_and_spends_above_it() -> None:
    plan = vm("a", limit=0.25, burst=3.0)
    host, governor = governed(plan)
    host.guests["a"].busy = False
    go(host, governor, 40.0)
    assert saved(governor) == pytest.approx(3.0)  # 40 s · 0.25, but no more than it may
    host.guests["a"].busy = True
    assert go(host, governor, 3.0)["a"] > 0.7
    assert go(host, governor, 30.0)["a"] < 0.25 + 3.0 / 30
    assert saved(governor) == pytest.approx(0.0, abs=0.02)
    assert go(host, governor, 10.0)["a"] == pytest.approx(0.25, rel=0.02)


def test_whatever_a_guest_does_it_never_uses_more_than_its_limit_and_its_burst() -> None:
    host, governor = governed(vm("a", limit=0.3, burst=1.5))
    began, before = host.time, host.guests["a"].used
    for busy_s, idle_s in ((5.0, 1.0), (0.7, 9.0), (2.0, 2.0), (6.0, 0.5)):
        for busy, seconds in ((True, busy_s), (False, idle_s)):
            host.guests["a"].busy = busy
            go(host, governor, seconds)
            assert host.guests["a"].used - before <= 0.3 * (host.time - began) + 1.5 + 0.02


def test_a_new_governor_goes_on_with_what_was_saved() -> None:
    _, governor = governed(vm("a", limit=0.25, burst=3.0, saved=2.0), vm("b", limit=0.25, burst=1.0, saved=2.0))
    assert [row.saved for row in governor.report().vms] == [2.0, 1.0]


def test_threads_are_bound_as_soon_as_other_programs_leave_too_little() -> None:
    host, governor = governed(vm("a"), vm("b"))
    host.others[0] = 0.5
    go(host, governor, 6.0)
    used = go(host, governor, 10.0)
    assert used["a"] == pytest.approx(0.75, rel=0.02)
    assert used["b"] == pytest.approx(0.75, rel=0.02)


def test_a_projects_limit_holds_for_its_vms_together() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"), projects=(ProjectPlan(name="default", limit=0.9),))
    go(host, governor, 2.0)
    assert sum(go(host, governor, 5.0).values()) == pytest.approx(0.9, rel=0.02)


def test_released_threads_run_anywhere_and_weights_stay_fair() -> None:
    host, governor = governed(vm("a"), vm("b", weight=200.0), vm("c"))
    go(host, governor, 2.0)
    governor.release()
    assert {guest.core for guest in host.guests.values()} == {None}
    assert all(guest.weight > 0.2 for guest in host.guests.values())


def test_a_report_says_who_was_entitled_to_what() -> None:
    host, governor = governed(vm("a"), vm("b"), vm("c"))
    go(host, governor, 3.0)
    governor.report()
    go(host, governor, 1.0)
    report = governor.report()
    assert report.steering
    assert report.idle == pytest.approx(0.0, abs=0.05)
    for row in report.vms:
        assert row.entitled == pytest.approx(2 / 3, rel=0.05)
        assert row.used == pytest.approx(2 / 3, rel=0.1)


def test_projects_come_first_then_the_vms_in_them() -> None:
    plans = [
        VmPlan(id=id, project=project, pid=1, threads=(2,)) for id, project in (("a", "p"), ("b", "q"), ("c", "q"))
    ]
    demands = [Demand(plan, 1.0, 1.0) for plan in plans]
    projects = (ProjectPlan(name="p", weight=100.0), ProjectPlan(name="q", weight=100.0))
    assert [round(g.entitled, 6) for g in entitlements(1.0, demands, projects)] == [0.5, 0.25, 0.25]


def test_an_idle_vm_can_count_on_its_share_at_once() -> None:
    plans = [VmPlan(id=id, project="p", pid=1, threads=(2,)) for id in "abc"]
    demands = [Demand(plan, wanted, 1.0) for plan, wanted in zip(plans, (1.0, 1.0, 0.0), strict=True)]
    granted = [grant.granted for grant in entitlements(1.5, demands, ())]
    assert granted[2] == pytest.approx(granted[0])


def test_a_reservation_holds_in_a_project_that_weighs_next_to_nothing() -> None:
    plans = [
        VmPlan(id="a", project="light", pid=1, threads=(2,), reserve=0.5),
        VmPlan(id="b", project="heavy", pid=1, threads=(2,)),
    ]
    projects = (ProjectPlan(name="light", weight=1.0), ProjectPlan(name="heavy", weight=10_000.0))
    found = entitlements(1.0, [Demand(plan, 1.0, 1.0) for plan in plans], projects)
    assert [round(grant.entitled, 3) for grant in found] == [0.5, 0.5]


def test_a_reservation_holds_beside_neighbours_that_come_and_go() -> None:
    host, governor = governed(vm("a", weight=1, reserve=0.5), vm("b"), vm("c"), vm("d"))
    used, since, found = 0.0, 0.0, []
    while len(found) < 20:
        for id, offset in (("c", 0.0), ("d", 0.8)):
            host.guests[id].busy = (host.time + offset) % 2.6 < 1.7
        host.run(governor.step())
        if host.time - since >= 2.6:
            found.append((host.guests["a"].used - used) / (host.time - since))
            used, since = host.guests["a"].used, host.time
    assert min(found) >= 0.5
