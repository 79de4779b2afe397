"""What goes wrong, and what the agent makes of it: crashes, panics, silence, taken ports, full disks, old records."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from corral.engine.protocol import Machine
from corral.errors import Unavailable
from corral.model import Forward, Memory, Nic, Power, Restart, TaskState, Vm
from corral.runtime.points import VM_POINTS
from tests.unit.stage import Stage, mac_of, on_stage, vm_id


def test_a_crash_is_restarted_after_a_while() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.crash(vm_id())
        vm = await stage.phase("pending")
        assert "signal 11" in vm.status.reason
        assert "Segmentation fault" in vm.status.reason
        assert vm.status.failures == 1
        vm = await stage.phase("running")
        assert stage.world.spawned == 2
        assert vm.status.retry_at is None

    on_stage(test)


def test_three_crashes_in_a_row_are_poison_until_a_person_starts_it() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        for _ in range(3):
            await stage.phase("running")
            stage.world.crash(vm_id())
            await stage.until("down", lambda vm: vm.status.phase in ("pending", "error"))
        vm = await stage.phase("error")
        assert "3 failures in a row" in vm.status.reason
        await asyncio.sleep(3600)
        assert stage.world.spawned == 3
        assert "Failed" in await stage.events()
        assert (await stage.done(await stage.ask("start"))).status.state is TaskState.DONE

    on_stage(test)


def test_failures_are_forgotten_after_ten_healthy_minutes() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        for _ in range(4):
            await stage.phase("running")
            await asyncio.sleep(700)
            stage.world.crash(vm_id())
            vm = await stage.phase("pending")
            assert vm.status.failures == 1
        await stage.phase("running")

    on_stage(test)


def test_a_guest_that_powers_off_stays_off() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.poweroff(vm_id())
        vm = await stage.phase("stopped")
        assert vm.status.reason == "the guest powered off"
        assert vm.spec.power is Power.STOPPED
        await asyncio.sleep(600)
        assert (await stage.vm()).status.reason == "the guest powered off"
        assert stage.world.spawned == 1
        assert not stage.world.machines
        assert (await stage.done(await stage.ask("start"))).status.state is TaskState.DONE

    on_stage(test)


def test_always_means_also_after_a_power_off() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(restart=Restart.ALWAYS)
        await stage.phase("running")
        stage.world.poweroff(vm_id())
        await stage.phase("pending")
        await stage.phase("running")
        assert stage.world.spawned == 2

    on_stage(test)


def test_never_means_an_error_after_a_crash() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(restart=Restart.NEVER)
        await stage.phase("running")
        stage.world.crash(vm_id())
        await stage.phase("error")
        await asyncio.sleep(600)
        assert stage.world.spawned == 1

    on_stage(test)


def test_a_guest_that_powers_off_during_its_launch_fails_the_launch() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.until("spawned", lambda vm: vm.status.pid is not None)
        stage.world.poweroff(vm_id())
        task = await stage.done("task-launch-web-1")
        assert task.status.state is TaskState.FAILED
        assert task.status.error is not None
        assert task.status.error["detail"] == "the guest powered off"

    on_stage(test)


def test_a_panic_is_told_as_one_and_restarted() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.panic(vm_id())
        vm = await stage.phase("pending")
        assert "panicked" in vm.status.reason
        await asyncio.sleep(1)
        assert "panicked" in (await stage.vm()).status.reason
        await stage.phase("running")
        assert "GuestPanic" in await stage.events()

    on_stage(test)


def test_a_reboot_inside_is_no_end() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.reboot(vm_id())
        await stage.phase("starting")
        vm = await stage.phase("running")
        assert (vm.status.failures, vm.status.boots, stage.world.spawned) == (0, 1, 1)

    on_stage(test)


def test_a_silent_guest_is_called_unresponsive_and_recovers_by_itself() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.deafen(vm_id())
        start = stage.rt.clock.monotonic()
        vm = await stage.phase("unresponsive")
        assert 10 <= stage.rt.clock.monotonic() - start <= 30
        assert "has not answered" in vm.status.reason
        stage.world.deafen(vm_id(), False)
        await stage.phase("running")
        assert [e for e in await stage.events() if e in ("Unresponsive", "Recovered")] == ["Unresponsive", "Recovered"]
        assert stage.world.spawned == 1

    on_stage(test)


def test_a_silent_hypervisor_is_told_and_delays_nobody() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("stuck")
        await stage.phase("running", "stuck")
        stage.world.hang(vm_id("stuck"))
        vm = await stage.phase("unresponsive", "stuck")
        assert vm.status.reason
        start = stage.rt.clock.monotonic()
        await stage.launch("other")
        await stage.phase("running", "other")
        assert stage.rt.clock.monotonic() - start < 5
        stage.world.hang(vm_id("stuck"), False)
        await stage.phase("running", "stuck")

    on_stage(test)


def test_a_silent_hypervisor_can_be_killed_with_force() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        stage.world.hang(vm_id())
        await stage.phase("unresponsive")
        assert (await stage.done(await stage.ask("stop", force=True))).status.state is TaskState.DONE
        assert not stage.world.machines

    on_stage(test)


def test_a_taken_port_that_was_asked_for_is_an_error_with_a_hint() -> None:
    async def test(stage: Stage) -> None:
        stage.world.foreign_ports.add(("tcp", 8080))
        await stage.launch(nics=(Nic(mac=mac_of("web"), publish=(Forward(host=8080, guest=80),)),))
        task = await stage.done("task-launch-web-1")
        assert task.status.error is not None
        assert task.status.error["code"] == "in-use"
        assert "8080" in task.status.error["detail"]
        assert task.status.error["hint"]
        assert stage.world.spawned == 0

    on_stage(test)


def test_a_taken_port_that_was_chosen_is_chosen_anew() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(nics=(Nic(mac=mac_of("web"), publish=(Forward(host=0, guest=80),)),))
        vm = await stage.phase("running")
        before = {p.purpose: p.host for p in vm.status.ports}
        await stage.done(await stage.ask("stop"))
        stage.world.foreign_ports.add(("tcp", before["ssh"]))
        await stage.done(await stage.ask("start"))
        after = {p.purpose: p.host for p in (await stage.vm()).status.ports}
        assert after["publish"] == before["publish"]
        assert after["ssh"] != before["ssh"]

    on_stage(test)


def test_what_does_not_fit_waits_with_numbers_and_starts_when_there_is_room() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("big", memory=Memory(size=5 << 30))
        await stage.phase("running", "big")
        await stage.launch("more", memory=Memory(size=5 << 30))
        vm = await stage.until("told", lambda vm: bool(vm.status.reason), "more")
        assert "memory: needs 5.1 GiB, 2.5 GiB free" in vm.status.reason
        await stage.done(await stage.ask("stop", "big"))
        await stage.phase("running", "more")

    on_stage(test)


def test_memory_that_other_programs_use_is_not_given_away() -> None:
    async def test(stage: Stage) -> None:
        stage.facts = stage.facts._replace(memory_available=100 << 20)
        await stage.launch()
        vm = await stage.until("told", lambda vm: "other programs" in vm.status.reason)
        assert vm.status.phase == "pending"
        stage.facts = stage.facts._replace(memory_available=4 << 30)
        await stage.phase("running")

    on_stage(test)


def test_a_full_disk_is_tried_again_and_then_told() -> None:
    async def test(stage: Stage) -> None:
        stage.disks.broken = True
        await stage.launch()
        vm = await stage.until("told", lambda vm: "no space left" in vm.status.reason)
        assert vm.status.phase == "pending"
        task = await stage.done("task-launch-web-1")
        assert task.status.state is TaskState.FAILED
        assert task.status.error is not None
        assert "no space left" in task.status.error["detail"]
        stage.disks.broken = False
        await stage.done(await stage.ask("start"))
        await stage.phase("running")

    on_stage(test)


def test_an_image_that_is_gone_is_an_error() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(image="other", image_id="image-other")
        task = await stage.done("task-launch-web-1")
        assert task.status.error is not None
        assert "image other is gone" in task.status.error["detail"]

    on_stage(test)


def test_an_unknown_machine_and_its_disk_are_left_alone_and_told() -> None:
    async def test(stage: Stage) -> None:
        stranger = vm_id("stranger")
        stage.world.start(Machine(id=stranger, name="stranger", memory=64 << 20))
        stage.disks.parts["lost"] = {"root.qcow2"}
        await stage.start()
        await stage.stop()
        await stage.start()  # the host's record exists now: events are about it
        await asyncio.sleep(600)
        assert stage.world.machines[stranger].alive
        assert "lost" in stage.disks.parts
        told = await stage.events()
        assert "UnknownMachine" in told
        assert "UnknownVolume" in told

    on_stage(test, started=False)


def test_a_process_of_a_newer_epoch_than_the_record_is_quarantined() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch()
        await stage.phase("running")
        await stage.stop()

        def older(vm: Vm) -> Vm:
            return msgspec.structs.replace(vm, status=msgspec.structs.replace(vm.status, epoch=0))

        await stage.objects.change(Vm, vm_id(), older)
        await stage.start()
        vm = await stage.phase("unknown")
        assert "epoch 1" in vm.status.reason
        await stage.ask("stop", force=True)
        await asyncio.sleep(60)
        assert stage.world.machines[vm_id()].alive, "never acted upon"

    on_stage(test, started=False)


def test_running_vms_do_not_notice_that_the_agent_died() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch()
        before = await stage.phase("running")
        await stage.stop()
        await asyncio.sleep(100)
        await stage.start()
        await asyncio.sleep(100)
        vm = await stage.vm()
        assert vm.status == before.status, "nothing was written at all"
        assert stage.agent.guests.view(vm_id()).answered
        assert vm_id() in stage.consoles.attached

    on_stage(test, started=False)


def test_a_vm_that_ended_while_the_agent_was_away_is_restarted() -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.launch("crashed")
        await stage.launch("vanished")
        await stage.phase("running", "crashed")
        await stage.phase("running", "vanished")
        await stage.stop()
        stage.world.crash(vm_id("crashed"))
        del stage.world.machines[vm_id("vanished")]
        await stage.start()
        for name in ("crashed", "vanished"):
            await stage.until("counted", lambda vm: vm.status.failures == 1, name)
            await stage.until("again", lambda vm: vm.status.phase == "running", name)
        assert stage.world.spawned == 4

    on_stage(test, started=False)


@pytest.mark.parametrize("point", VM_POINTS)
def test_an_agent_that_dies_at_any_point_goes_on_where_it_was(point: str) -> None:
    """Launch, stop, start, delete, with one death at the point; nothing is done twice, nothing is left over."""

    async def test(stage: Stage) -> None:
        stage.points.die_at, stage.points.died = point, asyncio.Event()

        async def undertaker() -> None:
            assert stage.points.died is not None
            await stage.points.died.wait()
            await stage.stop()
            await asyncio.sleep(1)
            await stage.start()

        dying = asyncio.create_task(undertaker())
        await stage.start()
        await stage.launch()
        assert (await stage.done("task-launch-web-1")).status.state is TaskState.DONE
        force = point == "stop.killed"
        assert (await stage.done(await stage.ask("stop", force=force))).status.state is TaskState.DONE
        assert (await stage.done(await stage.ask("start", force=False))).status.state is TaskState.DONE
        assert stage.world.spawned == 2, "each boot is one process"
        assert (await stage.vm()).status.failures == 0
        delete = await stage.ask("delete")
        await stage.gone()
        await asyncio.wait_for(dying, 10)
        assert (await stage.done(delete)).status.state is TaskState.DONE
        await asyncio.sleep(5)
        assert not stage.world.machines
        assert not stage.disks.parts
        assert point in stage.points.seen

    on_stage(test, started=False)


def test_a_stop_during_the_boot_is_heard_as_soon_as_somebody_listens() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.until("spawned", lambda vm: vm.status.pid is not None)
        start = stage.rt.clock.monotonic()
        assert (await stage.done(await stage.ask("stop"))).status.state is TaskState.DONE
        assert stage.rt.clock.monotonic() - start < 15

    on_stage(test, boot=(8.0, 9.0))


def test_a_host_keeps_its_name_whatever_the_machine_is_called_now() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await stage.stop()
        stage.name = "renamed"
        await stage.start()
        assert stage.agent.host_name == "here"
        assert (await stage.done(await stage.ask("stop"))).status.state is TaskState.DONE

    on_stage(test)


def test_two_vms_never_get_the_same_port() -> None:
    async def test(stage: Stage) -> None:
        for n in range(8):
            await stage.launch(f"m{n}")
        ports = [(await stage.phase("running", f"m{n}")).status.ports[0].host for n in range(8)]
        assert len(set(ports)) == 8

    on_stage(test)


def test_memory_is_counted_before_the_process_is_there() -> None:
    async def test(stage: Stage) -> None:
        for n in range(3):  # placement sees them one after the other; all are placed before one has started
            await stage.launch(f"m{n}", memory=Memory(size=2 << 30))
        for n in range(3):
            await stage.phase("running", f"m{n}")
        stage.facts = stage.facts._replace(memory=5 << 30, memory_available=5 << 30)
        for n in range(3):
            await stage.ask("restart", f"m{n}", force=True)
        most = 0
        for _ in range(600):
            most = max(most, sum(m.alive for m in stage.world.machines.values()))
            await asyncio.sleep(0.05)
        phases = sorted([(await stage.vm(f"m{n}")).status.phase for n in range(3)])
        assert phases == ["pending", "running", "running"]
        assert stage.world.spawned == 5

    on_stage(test, spawn=(2.0, 3.0))


def test_a_vm_that_no_host_takes_can_be_stopped_and_its_launch_has_a_deadline() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("a", memory=Memory(size=100 << 30), deadline_s=20)
        await stage.launch("b", memory=Memory(size=100 << 30))
        launch = await stage.done("task-launch-a-1", limit=25)
        assert launch.status.error is not None
        assert launch.status.error["code"] == "timed-out"
        assert "memory: needs" in launch.status.error["detail"]
        assert (await stage.done(await stage.ask("stop", "b"))).status.state is TaskState.DONE
        assert (await stage.done("task-launch-b-1")).status.state is TaskState.CANCELLED

    on_stage(test)


def test_a_broken_connection_is_made_anew_at_once() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        old = stage.agent.guests.guest(vm_id())

        async def broken(timeout: float = 2.0) -> None:
            raise Unavailable("the guest's channel was closed", code="unresponsive")

        old.ping = broken  # type: ignore[method-assign]
        await asyncio.sleep(7)
        assert stage.agent.guests.guest(vm_id()) is not old
        await asyncio.sleep(30)
        assert "Unresponsive" not in await stage.events()

    on_stage(test)
