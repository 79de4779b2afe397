"""One contract for both engines: what the agent may rely on, whether the machines are real or pretended."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from corral.engine.fake import FakeEngine, FakeWorld
from corral.engine.protocol import (
    Card,
    CardStats,
    Drive,
    DriveStats,
    Engine,
    HostForward,
    Limits,
    Machine,
    Sighting,
    State,
    Stats,
)
from corral.engine.qemu.engine import QemuEngine
from corral.engine.qemu.qmp import Verb
from corral.errors import CorralError, Invalid, NotFound, Refused
from corral.runtime import Runtime, process
from tests.probed import as_probed
from tests.tiny_guests import disk

REAL = shutil.which("qemu-system-x86_64") is not None


class Host:
    """A host with an engine on it. ``act`` makes the guest do what its disk says (the pretended ones need a push)."""

    def __init__(self, root: Path, rt: Runtime) -> None:
        self.root, self.rt = root, rt
        self.engine: Engine = self.daemon()
        self.heard: list[tuple[str, str]] = []
        self._ears = asyncio.create_task(self._listen(self.engine))

    def daemon(self) -> Engine:
        raise NotImplementedError

    def act(self, id: str, guest: str) -> None:
        raise NotImplementedError

    async def limits(self, id: str, drive: str) -> Limits:
        """What the machine itself says."""
        raise NotImplementedError

    async def _listen(self, engine: Engine) -> None:
        async for event in engine.events():
            self.heard.append((event.id, event.kind))

    async def restart(self) -> None:
        """The daemon goes away and another one comes."""
        self._ears.cancel()
        await self.engine.close()
        self.engine = self.daemon()
        self._ears = asyncio.create_task(self._listen(self.engine))

    def machine(self, guest: str = "idle", **more: object) -> Machine:
        id = self.rt.random.id()
        directory = self.root / "vms" / id
        directory.mkdir(parents=True)
        directory.chmod(0o711)
        drive = Drive(name="root", path=disk(directory / "root.raw", guest), format="raw", bootable=True)
        fields = {"id": id, "name": "tiny", "memory": 64 << 20, "drives": (drive,)} | more
        return Machine(**fields)  # type: ignore[arg-type]

    async def started(self, guest: str = "idle", **more: object) -> Machine:
        machine = self.machine(guest, **more)
        await self.engine.create(machine)
        await self.engine.resume(machine.id)
        return machine

    async def becomes(self, id: str, state: State, limit: float = 15.0) -> Sighting:
        async with asyncio.timeout(limit):
            while (seen := await self.engine.inspect(id)).state is not state:
                await asyncio.sleep(0.05)
        return seen

    async def hears(self, id: str, kind: str, limit: float = 15.0) -> None:
        async with asyncio.timeout(limit):
            while (id, kind) not in self.heard:
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        for seen in await self.engine.inventory():
            await self.engine.kill(seen.id)
            await self.engine.remove(seen.id)
        self._ears.cancel()
        await self.engine.close()


class RealHost(Host):
    def __init__(self, root: Path, rt: Runtime) -> None:
        as_probed(root)
        super().__init__(root, rt)

    def daemon(self) -> Engine:
        return QemuEngine(self.root / "vms", self.root, self.rt)

    def act(self, id: str, guest: str) -> None:
        """A real guest acts by itself."""

    async def limits(self, id: str, drive: str) -> Limits:
        assert isinstance(self.engine, QemuEngine)
        machine = await self.engine._known(id)
        said = await machine.command(Verb.GET, {"path": f"/objects/limits-{drive}", "property": "limits"})
        length = max(said["iops-total-max-length"], said["bps-total-max-length"])
        return Limits(
            iops=said["iops-total"], iops_burst=said["iops-total-max"], bandwidth=said["bps-total"],
            bandwidth_burst=said["bps-total-max"], burst_s=length if length > 1 else Limits().burst_s,
        )  # fmt: skip


class FakeHost(Host):
    def __init__(self, root: Path, rt: Runtime) -> None:
        self.world = FakeWorld(rt, root=root / "vms", boot=(0.05, 0.1), powerdown=(0.05, 0.1), spawn=(0.001, 0.002))
        super().__init__(root, rt)

    def daemon(self) -> Engine:
        return FakeEngine(self.world, self.rt)

    async def limits(self, id: str, drive: str) -> Limits:
        return self.world.machines[id].limits[drive]

    def act(self, id: str, guest: str) -> None:
        {"poweroff": self.world.poweroff, "panic": self.world.panic, "reboot-once": self.world.reboot}[guest](id)


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.skipif(not REAL, reason="QEMU is not here"))])
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    root = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    root.chmod(0o711)
    made: Host = (FakeHost if request.param == "fake" else RealHost)(root, Runtime())
    yield made
    await made.close()
    assert [path.name for path in (root / "vms").glob("*/run")] == []
    children = [now for pid in process.pids() if (now := process.stat(pid)) and now.parent == os.getpid()]
    assert [child.state for child in children if child.state == "Z"] == [], "an ended machine was not waited for"
    shutil.rmtree(root)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def card(port: int, protocol: str = "tcp") -> Card:
    forward = HostForward(protocol=protocol, address="127.0.0.1", host=port, guest=22)  # type: ignore[arg-type]
    return Card(name="nic0", mac="52:54:00:00:00:01", hostname="tiny", forwards=(forward,))


async def test_a_machine_is_created_still_and_runs_when_resumed(host: Host) -> None:
    machine = host.machine(epoch=7)
    made = await host.engine.create(machine)
    assert (made.state, made.epoch, made.accelerator) == (State.CREATED, 7, "tcg")
    assert made.pid is not None
    await host.engine.resume(machine.id)
    assert (await host.engine.inspect(machine.id)).state is State.RUNNING
    assert [seen.id for seen in await host.engine.inventory()] == [machine.id]


async def test_creating_again_leaves_the_machine_alone(host: Host) -> None:
    machine = host.machine()
    seen = await asyncio.gather(*(host.engine.create(machine) for _ in range(5)))
    await host.engine.resume(machine.id)
    again = await host.engine.create(machine)
    assert {one.pid for one in seen} == {again.pid}
    assert again.state is State.RUNNING


async def test_pause_and_resume(host: Host) -> None:
    machine = await host.started()
    await host.engine.pause(machine.id)
    assert (await host.engine.inspect(machine.id)).state is State.PAUSED
    await host.engine.pause(machine.id)
    await host.engine.resume(machine.id)
    assert (await host.engine.inspect(machine.id)).state is State.RUNNING


async def test_a_killed_machine_leaves_a_trace_until_it_is_removed(host: Host) -> None:
    machine = await host.started()
    await host.engine.kill(machine.id)
    seen = await host.engine.inspect(machine.id)
    assert seen.state is State.EXITED
    assert seen.exit is not None
    assert (seen.exit.asked, seen.exit.reason, seen.exit.signal) == (True, "killed", 9)
    assert seen.pid is None
    await host.hears(machine.id, "exited")
    await host.engine.kill(machine.id)
    await host.engine.remove(machine.id)
    await host.engine.remove(machine.id)
    assert (await host.engine.inspect(machine.id)).state is State.ABSENT
    assert await host.engine.inventory() == []


async def test_a_machine_that_ended_can_be_created_again(host: Host) -> None:
    machine = await host.started()
    first = await host.engine.inspect(machine.id)
    await host.engine.kill(machine.id)
    second = await host.engine.create(machine)
    assert second.state is State.CREATED
    assert second.pid != first.pid


async def test_a_running_machine_cannot_be_removed(host: Host) -> None:
    machine = await host.started()
    with pytest.raises(Refused) as caught:
        await host.engine.remove(machine.id)
    assert caught.value.code == "in-use"
    assert (await host.engine.inspect(machine.id)).state is State.RUNNING


async def test_a_guest_that_powers_off_ends_in_good_order(host: Host) -> None:
    machine = await host.started("poweroff")
    host.act(machine.id, "poweroff")
    seen = await host.becomes(machine.id, State.EXITED)
    assert seen.exit is not None
    assert (seen.exit.asked, seen.exit.code, seen.exit.reason) == (True, 0, "guest-shutdown")
    await host.hears(machine.id, "exited")


async def test_a_panic_stops_the_machine_and_is_told(host: Host) -> None:
    machine = await host.started("panic")
    host.act(machine.id, "panic")
    await host.becomes(machine.id, State.PANICKED)
    await host.hears(machine.id, "panic")


async def test_a_reboot_inside_the_guest_is_not_an_end(host: Host) -> None:
    machine = await host.started("reboot-once")
    before = await host.engine.inspect(machine.id)
    host.act(machine.id, "reboot-once")
    await host.hears(machine.id, "reset")
    after = await host.engine.inspect(machine.id)
    assert (after.state, after.pid) == (State.RUNNING, before.pid)


async def test_the_reset_button_restarts_a_panicked_guest(host: Host) -> None:
    machine = await host.started("panic")
    host.act(machine.id, "panic")
    before = await host.becomes(machine.id, State.PANICKED)
    await host.engine.reset(machine.id)
    after = await host.engine.inspect(machine.id)
    assert (after.state, after.pid) == (State.RUNNING, before.pid)
    await host.hears(machine.id, "reset")


async def test_the_power_button_is_obeyed(host: Host) -> None:
    machine = await host.started("obedient")
    async with asyncio.timeout(20):
        while (await host.engine.inspect(machine.id)).state is not State.EXITED:
            try:
                await host.engine.powerdown(machine.id)  # before the guest has booted nobody sees it
            except Refused:
                break  # it ended meanwhile
            await asyncio.sleep(0.3)
    seen = await host.becomes(machine.id, State.EXITED)
    assert seen.exit is not None
    assert seen.exit.reason == "guest-shutdown"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_port_is_had_by_one_machine_at_a_time(host: Host, protocol: str) -> None:
    port = free_port()
    first = host.machine(cards=(card(port, protocol),))
    second = host.machine(cards=(card(port, protocol),))
    made = await host.engine.create(first)
    assert [forward.host for forward in made.forwards] == [port]
    with pytest.raises(Refused) as caught:
        await host.engine.create(second)
    assert (caught.value.code, caught.value.field) == ("in-use", "ports")
    assert (await host.engine.inspect(second.id)).state is State.ABSENT
    await host.engine.kill(first.id)
    assert (await host.engine.create(second)).state is State.CREATED


async def test_machines_outlive_the_daemon(host: Host) -> None:
    machine = await host.started()
    still = host.machine()
    await host.engine.create(still)
    before = {seen.id: seen for seen in await host.engine.inventory()}
    await host.restart()
    assert {seen.id: seen for seen in await host.engine.inventory()} == before
    assert before[still.id].state is State.CREATED
    assert (await host.engine.create(machine)).pid == before[machine.id].pid
    await host.engine.pause(machine.id)
    await host.engine.kill(machine.id)
    await host.hears(machine.id, "exited")


async def test_an_end_that_no_daemon_saw_is_still_explained(host: Host) -> None:
    machine = await host.started()
    await host.engine.kill(machine.id)
    await host.restart()
    seen = await host.engine.inspect(machine.id)
    assert seen.exit is not None
    assert (seen.state, seen.exit.reason) == (State.EXITED, "killed")


async def test_nothing_can_be_done_with_a_machine_that_does_not_run(host: Host) -> None:
    id = host.rt.random.id()
    assert (await host.engine.inspect(id)).state is State.ABSENT
    for verb in (host.engine.resume, host.engine.pause, host.engine.reset, host.engine.powerdown):
        with pytest.raises(Refused) as caught:
            await verb(id)
        assert caught.value.code == "wrong-phase"
    await host.engine.kill(id)
    await host.engine.remove(id)


async def test_an_impossible_machine_is_refused_with_every_reason(host: Host) -> None:
    bad = Machine(id="../../etc", name="x", memory=-1, cpus=0, cards=(card(70000),))
    with pytest.raises(Invalid) as caught:
        await host.engine.create(bad)
    assert {"id", "memory", "cpus", "ports"} <= {problem.field for problem in caught.value.problems}
    assert await host.engine.inventory() == []


async def test_a_guests_use_of_its_drives_is_counted_from_the_start_of_its_process(host: Host) -> None:
    machine = host.machine(cards=(card(free_port()),))
    await host.engine.create(machine)
    before = await host.engine.stats(machine.id)
    assert before == Stats(drives=(DriveStats(name="root"),), cards=(CardStats(name="nic0"),))
    await host.engine.resume(machine.id)
    async with asyncio.timeout(15):
        while not (now := await host.engine.stats(machine.id)).drives[0].reads:
            await asyncio.sleep(0.05)
    (root,) = now.drives
    assert root.read >= 512 * root.reads > 0, "whole sectors: at least the one it boots from"
    assert (root.written, root.writes, root.flushes, root.failed) == (0, 0, 0, 0)
    await host.restart()
    assert (await host.engine.stats(machine.id)).drives[0].reads >= root.reads
    await host.engine.kill(machine.id)
    with pytest.raises(Refused) as caught:
        await host.engine.stats(machine.id)
    assert caught.value.code == "wrong-phase"


async def test_a_machine_has_all_its_memory_until_some_is_asked_back(host: Host) -> None:
    machine = host.machine(memory=96 << 20)
    assert (await host.engine.create(machine)).memory == 96 << 20
    sight = await host.engine.memory(machine.id)
    assert (sight.size, sight.granted, sight.available, sight.at) == (96 << 20, 96 << 20, None, None)
    await host.engine.resume(machine.id)
    await host.engine.poll_memory(machine.id, 1)
    await host.engine.poll_memory(machine.id, 0)
    await host.engine.balloon(machine.id, 96 << 20)
    await host.restart()
    assert (await host.engine.memory(machine.id)).granted == 96 << 20
    assert (await host.engine.inspect(machine.id)).memory == 96 << 20
    await host.engine.kill(machine.id)
    for late in (host.engine.memory(machine.id), host.engine.balloon(machine.id, 1), host.engine.poll_memory("no", 1)):
        with pytest.raises(Refused) as caught:
            await late
        assert caught.value.code == "wrong-phase"


async def test_limits_of_a_drive_change_while_the_machine_runs_and_are_lifted(host: Host) -> None:
    tight = Limits(iops=100, bandwidth=1 << 20, iops_burst=300, bandwidth_burst=1 << 22, burst_s=5)
    machine = host.machine()
    (drive,) = machine.drives
    machine = msgspec.structs.replace(machine, drives=(msgspec.structs.replace(drive, limits=tight),))
    await host.engine.create(machine)
    for limits in (Limits(iops=50), Limits(bandwidth=10 << 20), tight, tight, Limits()):
        await host.engine.throttle(machine.id, "root", limits)
        assert await host.limits(machine.id, "root") == limits
    with pytest.raises(NotFound):
        await host.engine.throttle(machine.id, "data", tight)
    await host.engine.kill(machine.id)
    with pytest.raises(Refused) as caught:
        await host.engine.throttle(machine.id, "root", tight)
    assert caught.value.code == "wrong-phase"


@pytest.mark.parametrize(
    "limits",
    [
        Limits(iops=-1), Limits(iops_burst=5), Limits(iops=10, iops_burst=9), Limits(bandwidth_burst=1),
        Limits(bandwidth=1, bandwidth_burst=10**15), Limits(iops=10**16), Limits(burst_s=1),
    ],
)  # fmt: skip
async def test_limits_that_no_hypervisor_takes_are_refused_before_there_is_a_process(
    host: Host, limits: Limits
) -> None:
    (drive,) = host.machine().drives
    machine = host.machine(drives=(msgspec.structs.replace(drive, limits=limits),))
    with pytest.raises(Invalid):
        await host.engine.create(machine)
    assert (await host.engine.inspect(machine.id)).state is State.ABSENT


async def test_a_silent_hypervisor_is_unresponsive_and_delays_nobody(host: Host) -> None:
    silent, well = await host.started(), await host.started()
    pid = (await host.engine.inspect(silent.id)).pid
    assert pid is not None
    if isinstance(host, FakeHost):
        host.world.hang(silent.id)
    else:
        os.kill(pid, signal.SIGSTOP)
    clock = host.rt.clock
    began = clock.monotonic()
    slow = asyncio.create_task(host.engine.inspect(silent.id))
    assert (await host.engine.inspect(well.id)).state is State.RUNNING
    assert clock.monotonic() - began < 1.0
    assert (await slow).state is State.UNRESPONSIVE
    assert clock.monotonic() - began < 3.0
    if isinstance(host, FakeHost):
        host.world.hang(silent.id, False)
    else:
        os.kill(pid, signal.SIGCONT)
    await host.becomes(silent.id, State.RUNNING)


async def test_the_channels_of_a_machine_lie_in_its_own_directory(host: Host) -> None:
    machine = host.machine()
    channels = host.engine.channels(machine.id)
    assert {path.parent for path in channels} == {host.root / "vms" / machine.id / "run"}
    assert len(set(channels)) == 3


async def test_probing_names_what_machines_get(host: Host) -> None:
    found = await host.engine.probe()
    working = [one.name for one in found.probes if one.works]
    assert found.accelerator == working[0]
    assert all(one.reason for one in found.probes)
    assert await host.engine.probe() == found


async def test_errors_of_the_hypervisor_are_ours(host: Host) -> None:
    if isinstance(host, FakeHost):
        pytest.skip("a pretended hypervisor has no words of its own")
    machine = host.machine(cpu_model="no-such-cpu")
    with pytest.raises(CorralError, match="no-such-cpu") as caught:
        await host.engine.create(machine)
    assert caught.value.code == "engine"
    assert (await host.engine.inspect(machine.id)).state is State.ABSENT
