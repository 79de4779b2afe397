"""Who uses what: records, the governor's report and what processes hold, joined; and how ``corral top`` shows it."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from corral.agent.meter import FRESH_S
from corral.agent.traffic import LONGEST_S, PATIENCE_S
from corral.cli.top import picture
from corral.governor.protocol import Plan, Report, VmReport
from corral.model import Cpu
from corral.model.usage import Usage

from .stage import MIB, Stage, on_stage, vm_id


class OneReport:
    """A governor that has said one thing about ``busy``, and nothing about anybody else."""

    async def run(self) -> None:
        """Does nothing."""

    def follow(self, plan: Plan) -> None:
        """Is not asked."""

    def report(self) -> Report | None:
        busy = VmReport(
            id=vm_id("busy"), entitled=1.5, granted=1.25, used=1.0, demand=2.0, wait=0.5, credit=-0.25, throttled=0.0
        )
        return Report(
            at=5.0, period_s=1.0, cores=2, idle=0.25, foreign=0.75, cost=0.01, mode="a test", steering=True, vms=(busy,)
        )


async def _two(stage: Stage) -> Usage:
    await stage.launch("busy", cpu=Cpu(count=2, weight=300))
    await stage.launch("new")
    await stage.phase("running", "busy")
    await stage.phase("running", "new")
    return await stage.agent.meter.usage()


def test_usage_joins_what_is_wanted_reported_and_held() -> None:
    async def test(stage: Stage) -> None:
        await stage.stop()
        stage.governing = OneReport()
        await stage.start()
        usage = await _two(stage)
        busy, new = usage.vms
        assert (busy.cpu.weight, busy.cpu.limit, busy.cpu.entitled, busy.cpu.used) == (300, 2.0, 1.5, 1.0)
        assert (new.cpu.weight, new.cpu.limit, new.cpu.entitled, new.cpu.used) == (100, 1.0, None, None)
        assert busy.memory.used == new.memory.used == 100 * MIB
        (project,) = usage.projects
        assert (project.vms, project.used, project.memory_used) == (2, 1.0, 200 * MIB), "sums of what is known"
        assert (usage.host.idle, usage.host.foreign, usage.host.steering) == (0.25, 0.75, True)

    on_stage(test)


def test_without_a_governor_nothing_is_guessed() -> None:
    async def test(stage: Stage) -> None:
        usage = await _two(stage)
        assert [vm.cpu.used for vm in usage.vms] == [None, None]
        assert usage.projects[0].used is None
        assert usage.host.idle is None

    on_stage(test)


def test_a_vm_without_a_process_uses_nothing_and_is_left_out() -> None:
    async def test(stage: Stage) -> None:
        await _two(stage)
        await stage.ask("stop", "busy", force=True)
        await stage.phase("stopped", "busy")
        await asyncio.sleep(FRESH_S)
        assert [vm.name for vm in (await stage.agent.meter.usage()).vms] == ["new"]

    on_stage(test)


def test_top_puts_the_busiest_first_and_a_dash_for_what_is_not_known() -> None:
    async def test(stage: Stage) -> None:
        await stage.stop()
        stage.governing = OneReport()
        await stage.start()
        lines = picture(msgspec.to_builtins(await _two(stage))).splitlines()
        rows = [line.split() for line in lines[-2:]]
        assert rows[0] == ["busy", "300", "2.00", "1.50", "1.25", "1.00", "0.50", "-0.25", "512M", "100M", "running"]
        assert rows[1] == ["new", "100", "1.00", "-", "-", "-", "-", "-", "512M", "100M", "running"]
        assert "other programs 0.75" in lines[1]

    on_stage(test)


def test_rates_of_drives_are_the_difference_of_two_looks() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("web")
        await stage.phase("running", "web")
        (first,) = (await stage.agent.meter.usage()).vms
        (disk,) = [one for one in first.disks if one.name == "root"]
        assert (disk.read_rate, disk.iops) == (None, None), "a first look knows no rates"
        before = disk.read
        stage.world.work(vm_id("web"), "root", read=8 * MIB, written=2 * MIB, reads=80, writes=20)
        await asyncio.sleep(2.0)
        (vm,) = (await stage.agent.meter.usage()).vms
        (disk,) = [one for one in vm.disks if one.name == "root"]
        assert (disk.read - before, disk.written) == (8 * MIB, 2 * MIB)
        assert (disk.read_rate, disk.write_rate, disk.iops) == pytest.approx((4 * MIB, MIB, 50.0))
        assert [(nic.received, nic.receive_rate) for nic in vm.nics] == [(None, None)], "user-mode cards count nothing"
        await asyncio.sleep(LONGEST_S + 1)
        (vm,) = (await stage.agent.meter.usage()).vms
        assert {one.read_rate for one in vm.disks} == {None}, "an average since long ago says nothing about now"

    on_stage(test)


def test_counters_of_another_process_make_no_rate() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("web")
        await stage.phase("running", "web")
        stage.world.work(vm_id("web"), "root", read=MIB, reads=1)
        await stage.agent.meter.usage()
        await stage.ask("restart", force=True)
        await stage.until("boots", lambda vm: vm.status.boots == 2 and vm.status.phase == "running")
        (vm,) = (await stage.agent.meter.usage()).vms
        assert all(one.read < MIB and one.read_rate is None for one in vm.disks), vm.disks

    on_stage(test)


def test_a_silent_qemu_keeps_nobody_waiting() -> None:
    async def test(stage: Stage) -> None:
        for name in ("web", "mute"):
            await stage.launch(name)
        for name in ("web", "mute"):
            await stage.phase("running", name)
        stage.world.hang(vm_id("mute"))
        began = stage.rt.clock.monotonic()
        mute, web = (await stage.agent.meter.usage()).vms
        assert stage.rt.clock.monotonic() - began <= PATIENCE_S + 0.01
        assert (mute.name, mute.disks, len(web.disks)) == ("mute", (), 2)

    on_stage(test)
