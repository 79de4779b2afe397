"""The life of a VM, as the agent makes it: launch, stop, start, restart, pause, delete, on a pretended host."""

from __future__ import annotations

import asyncio

import pytest

from corral.errors import NotFound
from corral.model import Memory, Power, Restart, Task, TaskState, Volume
from tests.unit.stage import Stage, on_stage, vm_id


def test_a_vm_is_launched_stopped_started_and_deleted() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        launched = await stage.done("task-launch-web-1")
        assert launched.status.state is TaskState.DONE, launched
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.reason, vm.status.host) == ("running", "", "here")
        assert vm.status.guest == "corral-guest"
        assert vm.status.accelerator == "tcg"
        assert vm.status.pid
        assert [p.purpose for p in vm.status.ports] == ["ssh"]
        assert stage.disks.parts[vm_id()] == {"root.qcow2", "seed.iso"}
        assert vm_id() in stage.consoles.attached

        stopped = await stage.done(await stage.ask("stop"))
        assert stopped.status.state is TaskState.DONE
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.pid, vm.status.addresses) == ("stopped", None, ())
        assert not stage.world.machines
        assert not stage.consoles.attached

        started = await stage.done(await stage.ask("start"))
        assert started.status.state is TaskState.DONE
        assert (await stage.vm()).status.ports == vm.status.ports, "the ports stay the same"

        await stage.ask("delete")
        await stage.gone()
        assert not stage.world.machines
        assert not stage.disks.parts
        assert (await stage.objects.get(Task, "task-delete-web-4")).status.state is TaskState.DONE
        assert (await stage.objects.list(Volume)).items == ()

    on_stage(test)


@pytest.mark.parametrize("daemon", ["the same daemon", "another daemon"])
@pytest.mark.parametrize("restart", list(Restart))
def test_a_start_that_supersedes_a_stop_is_done_when_the_guest_has_gone_off_and_runs_again(
    restart: Restart, daemon: str
) -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(restart=restart)
        pid = (await stage.phase("running")).status.pid
        await stage.ask("stop")
        await stage.phase("stopping")
        await asyncio.sleep(1)
        if daemon == "another daemon":
            await stage.stop()
            start = await stage.ask("start")
            await stage.start()
        else:
            start = await stage.ask("start")
        assert (await stage.done(start)).status.state is TaskState.DONE
        assert (await stage.vm()).status.pid != pid, "that one had been asked to power off"
        assert stage.world.machines[vm_id()].alive
        await asyncio.sleep(30)
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.reason, vm.status.failures) == ("running", "", 0)

    on_stage(test, powerdown=(6.0, 6.0))


def test_a_guest_that_does_not_heed_the_stop_runs_on_after_a_while() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        pid = (await stage.phase("running")).status.pid
        await stage.ask("stop")
        await stage.phase("stopping")
        start = await stage.ask("start")
        await stage.until("told", lambda vm: "asked to power off before" in vm.status.reason)
        assert (await stage.done(start)).status.state is TaskState.DONE
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.pid) == ("running", pid)

    on_stage(test, powerdown=(9000.0, 9000.0))


def test_the_steps_of_a_launch_are_named_for_people() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        task = await stage.done("task-launch-web-1")
        names = [step.name for step in task.status.steps]
        assert [n for n in names if n != "turn"] == ["volume", "seed", "start", "boot", "guest"]
        assert all(step.state is TaskState.DONE and step.started and step.ended for step in task.status.steps)

    on_stage(test)


def test_a_restart_boots_once_more_in_a_new_process() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        before = await stage.phase("running")
        task = await stage.done(await stage.ask("restart"))
        assert task.status.state is TaskState.DONE
        vm = await stage.vm()
        assert vm.status.phase == "running"
        assert vm.status.boots == 2
        assert vm.status.pid != before.status.pid
        assert vm.status.failures == 0

    on_stage(test)


def test_pause_and_resume_keep_the_process_and_set_the_clock() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        before = await stage.phase("running")
        assert (await stage.done(await stage.ask("pause"))).status.state is TaskState.DONE
        await asyncio.sleep(300)
        assert (await stage.vm()).status.phase == "paused", "its silence means nothing"
        assert (await stage.done(await stage.ask("resume"))).status.state is TaskState.DONE
        vm = await stage.vm()
        assert (vm.status.phase, vm.status.pid) == ("running", before.status.pid)
        guest = stage.agent.guests.guest(vm_id())
        assert abs(guest.identity.time - stage.rt.clock.now()) < 2  # type: ignore[attr-defined]

    on_stage(test)


def test_a_reset_boots_the_same_process_again() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        before = await stage.phase("running")
        assert (await stage.done(await stage.ask("reset"))).status.state is TaskState.DONE
        assert stage.world.machines[vm_id()].boots == 2
        assert (await stage.vm()).status.pid == before.status.pid

    on_stage(test)


def test_a_guest_that_ignores_stop_is_complained_about_and_killed_only_with_force() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.deafen(vm_id())
        asked = await stage.ask("stop", deadline_s=70)
        task = await stage.done(asked)
        assert task.status.state is TaskState.FAILED
        assert task.status.error is not None
        assert task.status.error["code"] == "timed-out"
        assert "'stop'" in task.status.error["detail"]
        assert task.status.error["details"]["serial"] == "login: "
        vm = await stage.vm()
        assert vm.status.phase == "stopping"
        assert "--force" in vm.status.reason
        assert "StopTimeout" in await stage.events()
        assert stage.world.machines[vm_id()].alive
        assert (await stage.done(await stage.ask("stop", force=True))).status.state is TaskState.DONE
        assert not stage.world.machines

    on_stage(test)


def test_a_paused_vm_can_be_stopped() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await stage.done(await stage.ask("pause"))
        assert (await stage.done(await stage.ask("stop"))).status.state is TaskState.DONE

    on_stage(test)


def test_a_newer_wish_ends_the_older_task_as_cancelled() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("starting")
        stop = await stage.ask("stop")
        launch = await stage.done("task-launch-web-1")
        assert launch.status.state is TaskState.CANCELLED
        assert launch.status.error is not None
        assert launch.status.error["detail"] == "superseded by stop"
        assert (await stage.done(stop)).status.state is TaskState.DONE

    on_stage(test)


def test_deleting_a_running_vm_cuts_its_power_and_leaves_nothing() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("starting")
        delete = await stage.ask("delete")
        await stage.gone()
        assert (await stage.done(delete)).status.state is TaskState.DONE
        assert (await stage.done("task-launch-web-1")).status.state is TaskState.CANCELLED
        assert not stage.world.machines
        assert not stage.disks.parts
        assert not stage.agent.picture.memory

    on_stage(test)


def test_deleting_a_vm_that_no_host_took_needs_no_host() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(memory=Memory(size=100 << 30))
        vm = await stage.until("refused", lambda vm: "memory: needs" in vm.status.reason)
        assert vm.status.host == ""
        await stage.ask("delete")
        await stage.gone()
        assert (await stage.done("task-delete-web-2")).status.state is TaskState.DONE

    on_stage(test)


def test_thirty_vms_at_once_all_come_up_a_few_at_a_time() -> None:
    async def test(stage: Stage) -> None:
        names = [f"m{n}" for n in range(30)]
        for name in names:
            await stage.launch(name, memory=Memory(size=64 << 20))
        most = 0
        while not all([(await stage.vm(name)).status.phase == "running" for name in names]):
            booting = [m for id, m in stage.world.machines.items() if m.alive and not stage.world.answers(id)]
            most = max(most, len(booting))
            await asyncio.sleep(0.05)
        assert most <= 3
        for name in names:
            assert (await stage.done(f"task-launch-{name}-1")).status.state is TaskState.DONE

    on_stage(test)


def test_a_vm_that_never_answers_does_not_hold_up_the_others() -> None:
    async def test(stage: Stage) -> None:
        for n in range(3):
            await stage.launch(f"dead{n}")
            await stage.until("spawned", lambda vm: vm.status.pid is not None, f"dead{n}")
            stage.world.deafen(vm_id(f"dead{n}"))
        await stage.launch("alive")
        await stage.phase("running", "alive", limit=100)
        assert (await stage.vm("dead0")).status.phase == "starting"

    on_stage(test)


def test_the_agent_writes_nothing_while_nothing_changes() -> None:
    async def test(stage: Stage) -> None:
        for n in range(5):
            await stage.launch(f"vm{n}")
            await stage.phase("running", f"vm{n}")
        await asyncio.sleep(5)
        before = (await stage.store.range("/")).revision
        await asyncio.sleep(3600)
        assert (await stage.store.range("/")).revision == before

    on_stage(test)


def test_a_vm_wanted_stopped_from_the_start_is_never_started() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(power=Power.STOPPED)
        await stage.phase("stopped")
        assert stage.world.spawned == 0

    on_stage(test)


def test_gone_is_gone() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await stage.ask("delete")
        await stage.gone()
        try:
            await stage.vm()
        except NotFound:
            return
        raise AssertionError("the record is still there")

    on_stage(test)
