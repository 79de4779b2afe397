"""Each row of the table of failures: noticed in the stated time, named in the record and by one event, and handled."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from corral.agent.failure import TABLE, Cause, end_of
from corral.agent.settings import Settings, read
from corral.engine.protocol import Exit, State
from corral.errors import Invalid
from corral.governor.protocol import Plan, Report, VmReport
from corral.host.cgroup.none import NoGroups
from corral.model import OnHang, Phase, Restart
from tests.unit.stage import Stage, on_stage, vm_id

BOUNDS = {
    Cause.GUEST_HANG: 22.5,
    Cause.AGENT_GONE: 22.5,
    Cause.QEMU_SILENT: 30.0,
    Cause.GUEST_SILENT: 300.0,
}
"""What the documents say, with the usual settings; everything else within 5 s."""


def test_every_cause_has_a_row_and_a_time() -> None:
    assert set(TABLE) == set(Cause)
    assert len({row.event for row in TABLE.values()}) == len(TABLE)
    assert {c: row.within(Settings()) for c, row in TABLE.items()} == {c: BOUNDS.get(c, 5.0) for c in Cause}


DEEDS: list[tuple[Cause, str, Phase]] = [
    (Cause.GUEST_POWERED_OFF, "poweroff", Phase.STOPPED),
    (Cause.GUEST_PANIC, "panic", Phase.PENDING),
    (Cause.GUEST_HANG, "deafen", Phase.UNRESPONSIVE),
    (Cause.AGENT_GONE, "end_agent", Phase.UNRESPONSIVE),
    (Cause.QEMU_SILENT, "hang", Phase.UNRESPONSIVE),
    (Cause.QEMU_CRASHED, "crash", Phase.PENDING),
    (Cause.DISK_FULL, "fill_disk", Phase.UNRESPONSIVE),
    (Cause.DISK_ERROR, "fail_disk", Phase.RUNNING),
]


@pytest.mark.parametrize(("cause", "deed", "phase"), DEEDS)
def test_it_is_noticed_in_the_stated_time_and_told_once(cause: Cause, deed: str, phase: Phase) -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await asyncio.sleep(123)
        getattr(stage.world, deed)(vm_id())
        start = stage.rt.clock.monotonic()
        vm = await stage.until(cause, lambda vm: vm.status.cause == cause)
        assert stage.rt.clock.monotonic() - start <= TABLE[cause].within(stage.settings)
        assert vm.status.phase is phase
        assert vm.status.reason
        await asyncio.sleep(5)
        assert (await stage.events()).count(TABLE[cause].event) == 1

    on_stage(test)


def test_a_guest_that_hangs_has_its_power_cut_after_more_patience() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.deafen(vm_id())
        vm = await stage.phase("unresponsive")
        assert "its power is cut 1m after that" in vm.status.reason
        start = stage.rt.clock.monotonic()
        vm = await stage.phase("pending")
        assert 59 <= stage.rt.clock.monotonic() - start <= 65
        assert vm.status.cause == Cause.GUEST_HANG
        assert vm.status.failures == 1
        vm = await stage.phase("running")
        assert (vm.status.cause, stage.world.spawned) == ("", 2)
        assert (await stage.events()).count("GuestHang") == 1

    on_stage(test)


def test_a_guest_that_comes_back_in_time_keeps_running() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        for _ in range(3):
            stage.world.deafen(vm_id())
            await stage.phase("unresponsive")
            await asyncio.sleep(40)
            stage.world.deafen(vm_id(), False)
            vm = await stage.phase("running")
            assert vm.status.cause == ""
        assert stage.world.spawned == 1
        assert (await stage.events()).count("Recovered") == 3

    on_stage(test)


@pytest.mark.parametrize("policy", [{"on_hang": OnHang.REPORT}, {"restart": Restart.NEVER}])
def test_a_hang_is_only_told_where_its_owner_wants_that(policy: dict[str, object]) -> None:
    async def test(stage: Stage) -> None:
        for name, deed in (("guest", stage.world.deafen), ("qemu", stage.world.hang)):
            await stage.launch(name, **policy)
            await stage.phase("running", name)
            deed(vm_id(name))
        await asyncio.sleep(3600)
        for name, cause in (("guest", Cause.GUEST_HANG), ("qemu", Cause.QEMU_SILENT)):
            vm = await stage.vm(name)
            assert (vm.status.phase, vm.status.cause) == (Phase.UNRESPONSIVE, cause)
            assert "power is cut" not in vm.status.reason
        assert stage.world.spawned == 2

    on_stage(test)


def test_the_owner_may_change_that_while_it_hangs() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(on_hang=OnHang.REPORT)
        await stage.phase("running")
        stage.world.deafen(vm_id())
        await stage.phase("unresponsive")
        await asyncio.sleep(600)
        await stage.ask("set", on_hang=OnHang.RESTART)
        await stage.phase("running")
        assert stage.world.spawned == 2

    on_stage(test)


def test_a_guest_whose_agent_was_ended_inside_is_left_alone() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.end_agent(vm_id())
        await asyncio.sleep(3600)
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.cause, stage.world.spawned) == (Phase.UNRESPONSIVE, Cause.AGENT_GONE, 1)

    on_stage(test)


def test_a_guest_that_never_answered_in_this_boot_is_only_told() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.until("spawned", lambda vm: vm.status.pid is not None)
        await asyncio.sleep(0.1)
        stage.world.deafen(vm_id())
        start = stage.rt.clock.monotonic()
        await stage.until("told", lambda vm: vm.status.cause == Cause.GUEST_SILENT, limit=400)
        assert stage.rt.clock.monotonic() - start <= 301
        await asyncio.sleep(3600)
        assert stage.world.spawned == 1

    on_stage(test)


def test_a_guest_that_hangs_while_no_daemon_runs_is_handled_by_the_next_one() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch()
        await stage.phase("running")
        await stage.stop()
        stage.world.deafen(vm_id())
        await stage.start()
        await stage.phase("unresponsive")
        await stage.phase("running")
        assert stage.world.spawned == 2

    on_stage(test, started=False)


def test_a_daemon_that_dies_between_writing_and_cutting_goes_on_with_the_cut() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch()
        await stage.phase("running")
        stage.points.die_at, stage.points.died = "end.recorded", asyncio.Event()
        stage.world.deafen(vm_id())
        await stage.points.died.wait()
        assert stage.world.machines[vm_id()].alive
        await stage.stop()
        stage.world.deafen(vm_id(), False)  # too late: it is written down that its power was cut
        await stage.start()
        vm = await stage.phase("running")
        assert (vm.status.failures, stage.world.spawned) == (1, 2)

    on_stage(test, started=False)


class Governor:
    """Says that the VM got so much of what it wanted."""

    def __init__(self, used: float, wait: float) -> None:
        self.used, self.wait = used, wait

    async def run(self) -> None:
        await asyncio.Event().wait()

    def follow(self, plan: Plan) -> None:
        """Nothing is governed."""

    def report(self) -> Report:
        row = VmReport(id=vm_id(), entitled=1, granted=1, used=self.used, demand=1, wait=self.wait, credit=0)
        return Report(at=0, period_s=1, cores=2, idle=0, foreign=0, cost=0, mode="", vms=(row,))


@pytest.mark.parametrize(("used", "wait", "times"), [(0.2, 0.8, 5), (0.0, 1.0, 20), (0.9, 0.04, 1), (0.0, 0.0, 1)])
def test_a_guest_that_waits_for_a_cpu_is_given_longer(used: float, wait: float, times: int) -> None:
    async def test(stage: Stage) -> None:
        stage.governing = Governor(used, wait)
        await stage.start()
        await stage.launch()
        await stage.phase("running")
        stage.world.deafen(vm_id())
        start = stage.rt.clock.monotonic()
        await stage.until("hung", lambda vm: vm.status.cause == Cause.GUEST_HANG, limit=1000)
        took = stage.rt.clock.monotonic() - start
        assert 12 * times <= took <= 22.5 * times + 7.5

    on_stage(test, started=False)


def test_standing_still_is_not_hanging() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.hang(vm_id())
        await asyncio.sleep(200)
        stage.world.hang(vm_id(), False)  # the guest has been silent for as long, and could not help it
        vm = await stage.phase("running")
        await asyncio.sleep(60)
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.failures) == (Phase.RUNNING, 0)
        assert "GuestHang" not in await stage.events()
        await stage.done(await stage.ask("pause"))
        await asyncio.sleep(600)
        await stage.done(await stage.ask("resume"))
        assert stage.world.spawned == 1
        assert "GuestHang" not in await stage.events()

    on_stage(test)


def test_a_qemu_that_falls_silent_again_is_judged_afresh() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        for _ in range(6):
            stage.world.hang(vm_id())
            start = stage.rt.clock.monotonic()
            await stage.until("silent", lambda vm: vm.status.cause == Cause.QEMU_SILENT, limit=40)
            assert 10 <= stage.rt.clock.monotonic() - start <= TABLE[Cause.QEMU_SILENT].within(stage.settings)
            await asyncio.sleep(100)
            stage.world.hang(vm_id(), False)
            await stage.phase("running")
            await asyncio.sleep(0.1)
        assert stage.world.spawned == 1

    on_stage(test)


def test_a_qemu_that_stays_silent_is_replaced_after_long() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.hang(vm_id())
        await stage.phase("unresponsive")
        start = stage.rt.clock.monotonic()
        vm = await stage.until("cut", lambda vm: vm.status.phase is Phase.PENDING, limit=400)
        assert 299 <= stage.rt.clock.monotonic() - start <= 310
        assert vm.status.cause == Cause.QEMU_SILENT
        await stage.phase("running")
        assert stage.world.spawned == 2

    on_stage(test)


def test_a_vm_on_a_full_disk_goes_on_when_there_is_space() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.fill_disk(vm_id())
        vm = await stage.until("named", lambda vm: vm.status.cause == Cause.DISK_FULL)
        assert vm.status.phase is Phase.UNRESPONSIVE
        seen = set()
        for _ in range(1200):  # however often it is tried again
            await asyncio.sleep(0.5)
            vm = await stage.vm()
            seen.add((vm.status.phase, vm.status.cause))
        assert seen == {(Phase.UNRESPONSIVE, Cause.DISK_FULL)}
        stage.world.fill_disk(vm_id(), False)
        await stage.phase("running")
        await asyncio.sleep(30)
        events = await stage.events()
        assert (events.count("DiskFull"), events.count("Unresponsive"), events.count("Recovered")) == (1, 1, 1)
        assert (stage.world.spawned, (await stage.vm()).status.failures) == (1, 0)

    on_stage(test)


def test_a_full_disk_is_still_known_to_the_next_daemon() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch()
        await stage.phase("running")
        stage.world.fill_disk(vm_id())
        await stage.phase("unresponsive")
        await stage.stop()
        await stage.start()
        await asyncio.sleep(60)
        assert (await stage.vm()).status.cause == Cause.DISK_FULL
        stage.world.fill_disk(vm_id(), False)
        await stage.phase("running")

    on_stage(test, started=False)


def test_a_stop_on_a_full_disk_says_what_it_waits_for_and_can_be_forced() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.fill_disk(vm_id())
        await stage.phase("unresponsive")
        await stage.ask("stop")
        await asyncio.sleep(60)
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.cause) == (Phase.STOPPING, Cause.DISK_FULL)
        assert "--force" in vm.status.reason
        await stage.done(await stage.ask("stop", force=True))

    on_stage(test)


def test_a_disk_error_stays_readable_for_a_while() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        for _ in range(3):
            stage.world.fail_disk(vm_id())
            await asyncio.sleep(100)
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.cause) == (Phase.RUNNING, Cause.DISK_ERROR)
        assert "Input/output error" in vm.status.reason
        await asyncio.sleep(700)
        assert (await stage.vm()).status.cause == ""
        assert (await stage.events()).count("DiskError") == 1

    on_stage(test)


class Oom(NoGroups):
    def ooms(self, id: str) -> int:
        return 1


@pytest.mark.parametrize(
    ("exit", "oom", "cause"),
    [
        (Exit(asked=True, code=0, reason="guest-shutdown"), False, Cause.GUEST_POWERED_OFF),
        (Exit(asked=False, reason="guest-panic"), False, Cause.GUEST_PANIC),
        (Exit(asked=False, signal=9, reason="crashed"), True, Cause.OUT_OF_MEMORY),
        (Exit(asked=False, reason="vanished"), True, Cause.OUT_OF_MEMORY),
        (Exit(asked=False, signal=9, reason="crashed"), False, Cause.QEMU_KILLED),
        (Exit(asked=False, code=0, reason="host-signal"), False, Cause.QEMU_KILLED),
        (Exit(asked=False, signal=11, reason="crashed"), False, Cause.QEMU_CRASHED),
        (Exit(asked=False, code=1, reason="crashed"), False, Cause.QEMU_CRASHED),
        (Exit(asked=False, reason="vanished"), False, Cause.QEMU_GONE),
        (Exit(asked=False, reason="never-started"), False, Cause.START_FAILED),
        (Exit(asked=False, reason="host-reboot"), False, Cause.HOST_RESTARTED),
        (None, False, Cause.QEMU_GONE),
    ],
)
def test_an_end_has_a_name_and_words(exit: Exit | None, oom: bool, cause: Cause) -> None:
    end = end_of(exit, oom=oom)
    assert end.cause is cause
    assert end.words


def test_an_end_for_memory_is_named_so() -> None:
    async def test(stage: Stage) -> None:
        stage.groups = Oom("a test")
        await stage.start()
        await stage.launch()
        await stage.phase("running")
        machine = stage.world.machines[vm_id()]
        stage.world.end(machine, Exit(asked=False, signal=9, reason="crashed"))
        vm = await stage.phase("pending")
        assert vm.status.cause == Cause.OUT_OF_MEMORY
        assert "OutOfMemory" in await stage.events()

    on_stage(test, started=False)


def test_a_restarted_host_is_no_vms_fault() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch()
        for boot in range(5):
            vm = await stage.phase("running")
            assert (vm.status.failures, stage.world.spawned) == (0, boot + 1)
            await stage.stop()
            stage.world.lose_power()
            await stage.start()
            await stage.until("again", lambda vm: vm.status.phase is not Phase.RUNNING)
        await stage.phase("running")
        assert (await stage.events()).count("HostRestarted") == 5

    on_stage(test, started=False)


def test_a_person_who_starts_a_poison_vm_clears_its_count() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        for _ in range(3):
            await stage.phase("running")
            stage.world.panic(vm_id())
            await stage.until("down", lambda vm: vm.status.phase in ("pending", "error"))
        vm = await stage.phase("error")
        assert (vm.status.cause, vm.status.failures) == (Cause.GUEST_PANIC, 3)
        await stage.done(await stage.ask("start"))
        assert (await stage.vm()).status.failures == 0
        stage.world.panic(vm_id())
        vm = await stage.phase("pending")
        assert vm.status.failures == 1

    on_stage(test)


def test_a_mass_failure_is_not_a_mass_start() -> None:
    async def test(stage: Stage) -> None:
        names = [f"vm{n}" for n in range(12)]
        for name in names:
            await stage.launch(name)
        for name in names:
            await stage.phase("running", name)
        for name in names:
            stage.world.crash(vm_id(name))
        await asyncio.sleep(5)
        most = 0
        while not all([(await stage.vm(name)).status.phase is Phase.RUNNING for name in names]):
            booting = [m for m in stage.world.machines.values() if m.alive and not stage.world.answers(m.machine.id)]
            most = max(most, len(booting))
            await asyncio.sleep(0.05)
        assert most == stage.facts.cpus + stage.settings.starting_extra

    on_stage(test)


def test_the_last_lines_of_the_console_are_told_with_a_panic() -> None:
    async def test(stage: Stage) -> None:
        said = (
            b"x" * 5000
            + b"\r\n\x1b[1;31mBUG: unable to handle\x1b[0m page fault\r\n\r\nKernel panic - not syncing\x07\r\n"
        )
        stage.consoles.said = said
        await stage.launch()
        await stage.phase("running")
        stage.world.panic(vm_id())
        await stage.phase("pending")
        message = (await stage.told("GuestPanic")).message
        assert message.endswith("\nBUG: unable to handle page fault\nKernel panic - not syncing")
        assert message.startswith("the guest's kernel panicked")

    on_stage(test)


def test_what_a_panic_was_about_is_told_however_long_its_trace_is() -> None:
    async def test(stage: Stage) -> None:
        trace = "".join(f"[    4.{n:06}] R{n:02}: {n:016x}\n" for n in range(100))
        stage.consoles.said = f"[    4.0] Kernel panic - not syncing: out of luck\n{trace}".encode()
        await stage.launch()
        await stage.phase("running")
        stage.world.panic(vm_id())
        await stage.phase("pending")
        message = (await stage.told("GuestPanic")).message
        assert "out of luck" in message.splitlines()[1]
        assert message.endswith(f"{99:016x}")
        assert len(message) < 1000

    on_stage(test)


def test_a_stalled_machine_can_still_be_paused_and_deleted() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.fill_disk(vm_id())
        await stage.phase("unresponsive")
        await stage.done(await stage.ask("pause"))
        assert stage.world.machines[vm_id()].state is State.STALLED
        await stage.done(await stage.ask("delete"))
        await stage.gone()

    on_stage(test)


def test_a_hosts_settings_are_read_and_wrong_ones_refused_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    assert read(path) == Settings()
    path.write_text("misses = 5\nhang_patience_s = 7\nbackoff_s = 0.5\n")
    assert read(path) == Settings(misses=5, hang_patience_s=7, backoff_s=0.5)
    path.write_text("misses = 2.5\nheartbeat_s = 0\npoison = true\nhealthy_s = nan\npatience = 1\n")
    with pytest.raises(Invalid) as refused:
        read(path)
    assert [p.field.split(": ")[1] for p in refused.value.problems] == [
        "misses", "heartbeat_s", "poison", "healthy_s", "patience",
    ]  # fmt: skip
    path.write_text("misses = ")
    with pytest.raises(Invalid):
        read(path)


def test_the_document_has_the_table_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs/howto/when-a-vm-fails.md").read_text()
    for cause, row in TABLE.items():
        cells = [f"`{cause}`", row.event, f"{math.ceil(row.within(Settings()))} s", row.seen, row.policy]
        assert f"| {' | '.join(cells)} |" in text
