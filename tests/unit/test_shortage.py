"""Who is short of CPU time for long: told once, over once, and silent about everyday life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from corral.agent.grants.accounts import LOOKS
from corral.governor.protocol import Plan, Report, VmReport
from corral.model import Cpu, Event
from corral.scheduler.shortage import BEGIN_S, END_S, Change, Look, Shortage, due

from .stage import Stage, on_stage, vm_id

WELL = Look(1.0, due=0.5, used=0.5, wait=0.5, throttled=0.0)
HELD = Look(1.0, due=0.5, used=0.5, wait=0.5, throttled=0.5)
STARVED = Look(1.0, due=0.5, used=0.2, wait=0.8, throttled=0.0)


def told(*looks: tuple[Look, int]) -> list[tuple[int, str]]:
    """When (in looks) what was told."""
    state, found, number = Shortage(), [], 0
    for look, times in looks:
        for _ in range(times):
            number += 1
            state, changes = state.after(look)
            found += [(number, change.reason) for change in changes]
    return found


def first(look: Look) -> Change:
    """The first thing told of a VM that always looks like this."""
    state, changes = Shortage(), tuple[Change, ...]()
    while not changes:
        state, changes = state.after(look)
    return changes[0]


def test_a_vm_that_is_held_by_its_limit_for_long_is_told_once_and_its_end_once() -> None:
    begin, end = int(BEGIN_S), int(END_S)
    assert told((HELD, begin - 1)) == []
    assert told((HELD, 10 * begin)) == [(begin, "CpuThrottled")]
    assert told((HELD, begin), (WELL, end - 1)) == [(begin, "CpuThrottled")]
    assert told((HELD, begin), (WELL, 5 * end)) == [(begin, "CpuThrottled"), (begin + end, "CpuRestored")]


def test_starving_is_less_than_half_of_what_is_due_while_more_is_wanted() -> None:
    assert told((STARVED, 100)) == [(int(BEGIN_S), "CpuStarved")]
    assert told((STARVED._replace(used=0.3), 100)) == []
    assert told((STARVED._replace(wait=0.0), 100)) == [], "it wants no more"
    assert told((Look(1.0, due=0.04, used=0.01, wait=0.03, throttled=0.0), 100)) == [], "a trifle"


def test_what_a_limit_holds_is_not_starving() -> None:
    assert told((Look(1.0, due=0.5, used=0.1, wait=0.9, throttled=0.9), 100)) == [(int(BEGIN_S), "CpuThrottled")]


def test_a_vm_at_the_edge_makes_one_event_and_short_breaks_make_none() -> None:
    edge = [(STARVED, 20), (WELL, 20)] * 30
    assert [reason for _, reason in told(*edge)] == ["CpuStarved"]
    assert told(*[(STARVED, 10), (WELL, 20)] * 30) == []


def test_the_length_of_a_look_counts_not_their_number() -> None:
    assert told((STARVED._replace(since_s=5.0), 50)) == [(6, "CpuStarved")]


def test_the_sentence_says_how_much() -> None:
    assert (
        first(STARVED).sentence() == "it used 0.20 cores of the 0.50 it should have had, for 30 s, and waited for more"
    )
    assert first(HELD).sentence() == "its limit held it for 50% of the last 30 s in which it wanted to run"


def test_due_is_the_entitlement_as_if_other_programs_took_nothing_but_never_more_than_is_wanted() -> None:
    assert due(0.25, 1.0, 2.0, 1.0) == pytest.approx(0.5)
    assert due(0.25, 0.25, 2.0, 1.0) == pytest.approx(0.25)
    assert due(0.5, 1.0, 2.0, 0.0) == pytest.approx(0.5)
    assert due(0.05, 1.0, 2.0, 2.0) == pytest.approx(1.0), "a host that has nothing left for VMs"


class Reporting:
    """A governor that says every second what it is told to say."""

    def __init__(self, now: Callable[[], float], vms: tuple[VmReport, ...]) -> None:
        self.now, self.vms, self.silent = now, vms, False

    async def run(self) -> None:
        await asyncio.Event().wait()

    def follow(self, plan: Plan) -> None:
        """Its plan is of no interest."""

    def report(self) -> Report | None:
        if self.silent:
            return None
        at = float(int(self.now()))
        return Report(at=at, period_s=1.0, cores=2, idle=0.0, foreign=0.0, cost=0.0, mode="", vms=self.vms)


def said(name: str, **fields: float) -> VmReport:
    figures = {"entitled": 0.5, "granted": 0.5, "used": 0.5, "demand": 1.0, "wait": 0.5, "credit": 0.0}
    return VmReport(id=vm_id(name), **{**figures, **fields})


async def reporting(stage: Stage, *vms: VmReport) -> Reporting:
    await stage.stop()
    stage.governing = governing = Reporting(stage.rt.clock.monotonic, vms)
    await stage.start()
    return governing


def test_a_starving_vm_makes_an_event_and_another_when_it_is_over() -> None:
    async def test(stage: Stage) -> None:
        governing = await reporting(stage, said("web", used=0.1), said("db"))
        await stage.launch("web")
        await stage.launch("db")
        await stage.phase("running", "web")
        await asyncio.sleep(2 * BEGIN_S)
        governing.vms = (said("web"), said("db"))
        await asyncio.sleep(2 * END_S)
        await asyncio.sleep(0.1)
        events = [e.spec for e in (await stage.objects.list(Event)).items if e.spec.reason.startswith("Cpu")]
        events.sort(key=lambda e: e.at)
        assert [(e.about_name, e.reason, e.severity) for e in events] == [
            ("web", "CpuStarved", "warning"), ("web", "CpuRestored", "info"),
        ]  # fmt: skip

    on_stage(test)


def test_a_vm_of_a_host_full_of_other_programs_starves_although_it_has_its_part_of_what_is_left() -> None:
    async def test(stage: Stage) -> None:
        governing = await reporting(stage)
        one = said("web", entitled=0.1, used=0.1, demand=1.0, wait=0.9)
        governing.report = lambda: Report(  # type: ignore[method-assign]
            at=float(int(stage.rt.clock.monotonic())), period_s=1.0, cores=2, idle=0.0, foreign=1.8, cost=0.0, mode="",
            vms=(one,),
        )  # fmt: skip
        await stage.launch("web", cpu=Cpu(count=1))
        await stage.phase("running", "web")
        await asyncio.sleep(2 * BEGIN_S)
        assert "CpuStarved" in await stage.events()

    on_stage(test)


def test_sums_grow_with_time_and_the_last_seconds_are_averages() -> None:
    async def test(stage: Stage) -> None:
        governing = await reporting(stage, said("web", used=0.25))
        await stage.launch("web")
        await stage.phase("running", "web")
        await asyncio.sleep(100)
        sums = stage.agent.accounts.sums(vm_id("web"))
        assert sums is not None
        assert sums.used == pytest.approx(0.25 * sums.seconds)
        assert sums.seconds > 99
        governing.vms = (said("web", used=0.75),)
        await asyncio.sleep(LOOKS + 2)
        lately = stage.agent.accounts.lately(vm_id("web"))
        assert lately is not None
        assert (lately.seconds, lately.used) == (pytest.approx(LOOKS - 1), pytest.approx(0.75))
        usage = await stage.agent.meter.lately()
        assert usage.host.period_s == pytest.approx(LOOKS - 1)
        (vm,) = usage.vms
        assert vm.cpu.used == pytest.approx(0.75)
        assert vm.cpu.total is not None
        assert vm.cpu.total.used > 25.0
        governing.silent = True
        await asyncio.sleep(60)
        governing.silent = False
        await asyncio.sleep(2)
        after = stage.agent.accounts.sums(vm_id("web"))
        assert after is not None
        assert after.seconds < sums.seconds + LOOKS + 10, "nothing is made up for the time without a governor"

    on_stage(test)


def test_a_vm_that_is_gone_is_forgotten() -> None:
    async def test(stage: Stage) -> None:
        governing = await reporting(stage, said("web"), said("db"))
        await stage.launch("web")
        await stage.phase("running", "web")
        await asyncio.sleep(5)
        await stage.ask("delete", "web", force=True)
        await stage.gone("web")
        governing.vms = (said("db"),)
        await asyncio.sleep(3)
        assert stage.agent.accounts.sums(vm_id("web")) is None

    on_stage(test)
