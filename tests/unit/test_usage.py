"""Who uses what: records, the governor's report and what processes hold, joined; and how ``corral top`` shows it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from corral.agent.meter import FRESH_S
from corral.agent.traffic import LONGEST_S, PATIENCE_S
from corral.cli.top import WIDTH, View
from corral.governor.protocol import Plan, Report, VmReport
from corral.model import Cpu, Phase
from corral.model.usage import CpuUsage, DiskUsage, HostUsage, MemoryUsage, ProjectUsage, Usage, VmUsage

from .stage import MIB, Stage, on_stage, vm_id


class OneReport:
    """A governor that has said one thing about ``busy``, and nothing about anybody else."""

    async def run(self) -> None:
        """Does nothing."""

    def follow(self, plan: Plan) -> None:
        """Is not asked."""

    def report(self) -> Report | None:
        busy = VmReport(
            id=vm_id("busy"),
            entitled=1.5,
            granted=1.25,
            used=1.0,
            demand=2.0,
            wait=0.5,
            credit=-0.25,
            saved=3.5,
            throttled=0.0,
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
        assert (busy.cpu.saved, new.cpu.saved) == (3.5, None)
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
        lines = View().picture(msgspec.to_builtins(await _two(stage))).splitlines()
        rows = [line.split() for line in lines[-2:]]
        busy = ["busy", "300", "1.50", "1.25", "1.00", "0.50", "-0.25", "512M", "100M", "-", "-", "-", "running"]
        assert rows[0] == busy
        assert rows[1] == ["new", "100", *"-----", "512M", "100M", *"---", "running"]
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


def _usage(*vms: VmUsage, projects: int = 1) -> dict[str, Any]:
    names = [f"p{number}" for number in range(projects)]
    found = tuple(
        ProjectUsage(name=name, weight=100, reserve=0.0, limit=None, vms=1, used=float(number), disk_read=5.0)
        for number, name in enumerate(names)
    )  # fmt: skip
    host = HostUsage(name="here", cores=2, memory=8 << 30, memory_available=4 << 30)
    return dict(msgspec.to_builtins(Usage(at=1.0, host=host, vms=vms, projects=found)))


def _row(name: str, *, used: float = 0.0, held: int = 0, read: float = 0.0) -> VmUsage:
    disk = DiskUsage(name="root", read=0, written=0, reads=0, writes=0, flushes=0, failed=0, read_rate=read, iops=12.4)
    return VmUsage(
        id=name, name=name, project="p0", phase=Phase.UNRESPONSIVE, disks=(disk, disk),
        cpu=CpuUsage(weight=10000, reserve=0.0, limit=1.0, used=used, entitled=10.25, granted=10.25, wait=10.25, credit=-1.0),
        memory=MemoryUsage(size=1023 * MIB, used=held),
    )  # fmt: skip


def test_top_sorts_by_what_is_asked() -> None:
    usage = _usage(
        _row("c", used=3.0, held=1, read=2.0), _row("b", used=1.0, held=3, read=1.0), _row("a", held=2, read=3.0)
    )
    order = {
        sort: "".join(vm["name"] for vm in View(sort).sorted_vms(usage)) for sort in ("cpu", "memory", "disk", "name")
    }
    assert order == {"cpu": "cba", "memory": "bac", "disk": "acb", "name": "abc"}


def test_top_adds_up_drives_and_keeps_its_lines_short_by_cutting_names() -> None:
    usage = _usage(_row("n" * 63, used=1.0, read=1023 * 1000.0))
    lines = View().picture(usage).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[-1].split()[0].endswith("…")
    assert {"1.95M", "25"} <= set(lines[-1].split())
    wide = View(wide=True).picture(usage).splitlines()
    assert wide[-1].split()[0] == "n" * 63
    assert {"RESERVE", "HELD", "SAVED", "RECEIVE", "SEND", "ACCEL"} <= set(wide[-2].split())


def test_top_shows_memory_that_was_taken_back() -> None:
    usage = _usage(_row("web", used=1.0))
    for granted, shown in ((None, "1023M"), (1023 * MIB, "1023M"), (512 * MIB, "512M/1023M")):
        usage["vms"][0]["memory"]["granted"] = granted
        assert shown in View().picture(usage).splitlines()[-1].split()


def test_top_shows_projects_alone_or_beside_their_vms() -> None:
    usage = _usage(_row("web"), projects=2)
    alone = View(projects=True).picture(usage)
    assert [line.split()[0] for line in alone.splitlines()[2:]] == ["PROJECT", "p1", "p0"]
    assert "p0/web" in View().picture(usage)
    assert "PROJECT" in View().picture(usage)
    assert "PROJECT" not in View().picture(_usage(_row("web")))
