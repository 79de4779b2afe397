"""Limits of disks follow the record: while the VM runs, after the daemon's restart, and never through another's silence."""

from __future__ import annotations

import asyncio

from hypothesis import given as of
from hypothesis import strategies as st

from corral.agent.grants.disk import toward
from corral.engine.protocol import Limits
from corral.engine.qemu.throttle import limit_problems
from corral.errors import CorralError
from corral.model import Disk, Event, Power
from corral.scheduler.ramp import DISK_STEPS
from tests.unit.stage import Stage, on_stage, vm_id


def given(stage: Stage, name: str = "web") -> Limits:
    return stage.world.machines[vm_id(name)].limits["root"]


def test_limits_are_there_from_the_start_and_change_within_seconds() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(disk=Disk(iops=500, bandwidth=1 << 20))
        await stage.phase("running")
        assert given(stage) == Limits(iops=500, bandwidth=1 << 20)
        await stage.ask("set", disk=Disk(iops=100, iops_burst=300, burst_s=5))
        await asyncio.sleep(2)
        assert given(stage) == Limits(iops=100, iops_burst=300, burst_s=5)
        await stage.ask("set", disk=Disk())
        await asyncio.sleep(2)
        assert given(stage) == Limits()

    on_stage(test)


def test_a_raised_limit_is_reached_in_steps() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(disk=Disk(iops=100))
        await stage.phase("running")
        await asyncio.sleep(2)
        await stage.ask("set", disk=Disk(iops=1000))
        seen = []
        for _ in range(60):
            await asyncio.sleep(0.1)
            seen.append(given(stage).iops)
        assert list(dict.fromkeys(seen)) == [100, 350, 600, 850, 1000]

    on_stage(test)


def limits() -> st.SearchStrategy[Limits]:
    """What may be set: bursts are no less than what they go beyond."""
    pair = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans()).map(
        lambda t: (t[0], t[0] + t[1] if t[0] and t[2] else 0)
    )
    return st.tuples(pair, pair, st.integers(2, 100)).map(
        lambda t: Limits(iops=t[0][0], iops_burst=t[0][1], bandwidth=t[1][0], bandwidth_burst=t[1][1], burst_s=t[2])
    )


@of(limits() | st.none(), limits())
def test_each_step_is_possible_and_a_few_lead_to_what_is_wanted(now: Limits | None, wanted: Limits) -> None:
    before = now
    for _ in range(DISK_STEPS):
        now = toward(now, wanted)
        assert list(limit_problems(now)) == []
        assert now.iops <= wanted.iops or not wanted.iops, "never more than is wanted"
        if before is not None and before.iops >= wanted.iops > 0:
            assert now.iops == wanted.iops, "a cut is immediate"
    assert now == wanted


def test_what_changed_while_no_daemon_ran_holds_when_it_is_back() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(disk=Disk(iops=500))
        await stage.phase("running")
        await stage.stop()
        await stage.ask("set", disk=Disk())
        await stage.start()
        await asyncio.sleep(5)
        assert given(stage) == Limits()

    on_stage(test)


def test_a_paused_vm_is_limited_too_and_a_stopped_one_at_its_next_start() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await stage.done(await stage.ask("pause"))
        await stage.ask("set", disk=Disk(iops=40))
        await asyncio.sleep(2)
        assert given(stage) == Limits(iops=40)
        await stage.done(await stage.ask("resume"))
        await stage.done(await stage.ask("stop"))
        await stage.ask("set", disk=Disk(iops=50), power=Power.RUNNING)
        await stage.phase("running")
        assert given(stage) == Limits(iops=50)

    on_stage(test)


def test_a_silent_hypervisor_delays_no_other_and_is_set_when_it_answers() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("mute")
        await stage.launch("well")
        await stage.phase("running", "mute")
        await stage.phase("running", "well")
        stage.world.hang(vm_id("mute"))
        for name in ("mute", "well"):
            await stage.ask("set", name, disk=Disk(iops=40))
        await asyncio.sleep(2)
        assert given(stage, "well") == Limits(iops=40)
        assert given(stage, "mute") == Limits()
        stage.world.hang(vm_id("mute"), False)
        await asyncio.sleep(30)
        assert given(stage, "mute") == Limits(iops=40)

    on_stage(test)


def test_what_the_hypervisor_refuses_is_told_once_and_tried_again_when_it_changes() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        engine, asked = stage.engine, 0
        real = engine.throttle

        async def refuse(id: str, drive: str, limits: Limits) -> None:
            nonlocal asked
            asked += 1
            if limits.iops == 40:
                raise CorralError("QEMU refused qom-set: no", code="engine")
            await real(id, drive, limits)

        engine.throttle = refuse  # type: ignore[method-assign]
        await stage.ask("set", disk=Disk(iops=40))
        await asyncio.sleep(10)
        assert asked == 1
        told = [e for e in (await stage.objects.list(Event)).items if e.spec.reason == "DiskLimitsRefused"]
        assert [(e.spec.message, e.spec.severity) for e in told] == [("QEMU refused qom-set: no", "warning")]
        await stage.ask("set", disk=Disk(iops=50))
        await asyncio.sleep(2)
        assert given(stage) == Limits(iops=50)

    on_stage(test)
