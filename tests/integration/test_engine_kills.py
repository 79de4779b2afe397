"""The daemon dies by SIGKILL at any step: the next one finds every machine, never makes a second one, leaks nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from corral.engine.protocol import Drive, Machine, State
from corral.engine.qemu.engine import QemuEngine
from corral.engine.qemu.record import RunDir
from corral.runtime import Runtime, process
from corral.runtime.points import ENGINE_POINTS
from tests.probed import as_probed
from tests.tiny_guests import disk

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not here")

DAEMON = textwrap.dedent(
    """
    import asyncio, os, signal, sys
    from pathlib import Path
    from corral.engine.protocol import Drive, Machine
    from corral.engine.qemu.engine import QemuEngine
    from corral.runtime import Runtime
    from corral.runtime.faults import KillAt

    async def main(root, id):
        engine = QemuEngine(root / "vms", root, Runtime(faults=KillAt.from_environment()))
        drive = Drive(name="root", path=root / "vms" / id / "root.raw", format="raw", bootable=True)
        await engine.create(Machine(id=id, name="tiny", memory=64 << 20, epoch=3, drives=(drive,)))
        await engine.resume(id)
        print("runs", flush=True)
        if "wait" in sys.argv:
            await asyncio.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
    """
)


@pytest.fixture
def root() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def engine(root: Path) -> AsyncIterator[QemuEngine]:
    as_probed(root)
    made = QemuEngine(root / "vms", root, Runtime())
    yield made
    for seen in await made.inventory():
        await made.kill(seen.id)
        await made.remove(seen.id)
    await made.close()


def machine_on(root: Path, guest: str = "idle") -> Machine:
    id = Runtime().random.id()
    directory = root / "vms" / id
    directory.mkdir(parents=True)
    for path in (root / "vms", directory):
        path.chmod(0o711)
    drive = Drive(name="root", path=disk(directory / "root.raw", guest), format="raw", bootable=True)
    return Machine(id=id, name="tiny", memory=64 << 20, epoch=3, drives=(drive,))


async def daemon_dies(root: Path, id: str, point: str = "") -> None:
    """A daemon creates and starts the machine and is killed: at the point, or when it runs."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(root), id, env={**os.environ, "CORRAL_KILL_AT": point}
    )
    assert await child.wait() == -signal.SIGKILL


def processes(id: str) -> list[int]:
    return list(process.with_arguments(b"-uuid", id.encode()))


@pytest.mark.parametrize("point", ENGINE_POINTS)
async def test_a_kill_at_any_step_of_the_start_leaves_one_machine_or_none(
    root: Path, engine: QemuEngine, point: str
) -> None:
    machine = machine_on(root)
    await daemon_dies(root, machine.id, point)
    assert len(processes(machine.id)) == (0 if point == "engine.spawn.dir" else 1)
    survivors = processes(machine.id)
    seen = await engine.create(machine)
    assert seen.state is State.CREATED
    assert processes(machine.id) == [seen.pid]
    if survivors:
        assert survivors == [seen.pid]
    assert seen.epoch == 3
    await engine.resume(machine.id)
    await engine.kill(machine.id)
    await engine.remove(machine.id)
    assert processes(machine.id) == []
    assert [path.name for path in (root / "vms" / machine.id).iterdir()] == ["root.raw"]


async def test_a_half_made_machine_can_be_removed_at_once(root: Path, engine: QemuEngine) -> None:
    machine = machine_on(root)
    await daemon_dies(root, machine.id, "engine.spawn.process")
    assert [seen.id for seen in await engine.inventory()] == [machine.id]
    await engine.kill(machine.id)
    await engine.remove(machine.id)
    assert processes(machine.id) == []


async def test_a_running_machine_is_taken_over_with_its_events(root: Path, engine: QemuEngine) -> None:
    machine = machine_on(root, "obedient")
    await daemon_dies(root, machine.id)
    (seen,) = await engine.inventory()
    assert (seen.state, seen.epoch, seen.accelerator) == (State.RUNNING, 3, "tcg")
    assert processes(machine.id) == [seen.pid]
    async with asyncio.timeout(20):
        while (seen := await engine.inspect(machine.id)).state is State.RUNNING:
            await engine.powerdown(machine.id)
            await asyncio.sleep(0.3)
        async for event in engine.events():
            if event.kind == "exited":
                break
    seen = await engine.inspect(machine.id)
    assert seen.exit is not None
    assert (seen.exit.reason, seen.exit.asked, seen.exit.code) == ("guest-shutdown", True, None)


async def test_a_guest_that_powered_off_while_no_daemon_ran_is_told_from_a_crash(
    root: Path, engine: QemuEngine
) -> None:
    well, crashed = machine_on(root, "poweroff"), machine_on(root)
    await asyncio.gather(daemon_dies(root, well.id), daemon_dies(root, crashed.id))
    for pid in processes(crashed.id):
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while processes(well.id) or processes(crashed.id):
            await asyncio.sleep(0.05)
    ends = {seen.id: seen.exit for seen in await engine.inventory()}
    assert ends[well.id] is not None
    assert ends[crashed.id] is not None
    assert (ends[well.id].reason, ends[well.id].asked) == ("guest-shutdown", True)  # type: ignore[union-attr]
    assert (ends[crashed.id].reason, ends[crashed.id].asked) == ("vanished", False)  # type: ignore[union-attr]


async def test_a_record_of_another_boot_names_no_process(root: Path, engine: QemuEngine) -> None:
    machine = machine_on(root)
    await daemon_dies(root, machine.id)
    run = RunDir(root / "vms", machine.id)
    record = run.read()
    assert record is not None
    assert record.pid is not None
    os.kill(record.pid, signal.SIGKILL)
    run.write(msgspec.structs.replace(record, boot_id="another", pid=os.getpid()))
    seen = await engine.inspect(machine.id)
    assert seen.exit is not None
    assert (seen.state, seen.exit.reason) == (State.EXITED, "host-reboot")
    await engine.kill(machine.id)  # must not signal the process that has the pid now: this one


async def test_a_reused_pid_is_not_taken_for_the_machine(root: Path, engine: QemuEngine) -> None:
    machine = machine_on(root)
    await daemon_dies(root, machine.id)
    run = RunDir(root / "vms", machine.id)
    record = run.read()
    assert record is not None
    assert record.pid is not None
    os.kill(record.pid, signal.SIGKILL)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        run.write(msgspec.structs.replace(record, pid=bystander.pid))
        await engine.kill(machine.id)
        assert (await engine.inspect(machine.id)).state is State.EXITED
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_a_machine_is_found_without_its_record(root: Path, engine: QemuEngine) -> None:
    machine = machine_on(root)
    await daemon_dies(root, machine.id)
    RunDir(root / "vms", machine.id).record.write_bytes(b"{ damaged")
    before = processes(machine.id)
    assert (await engine.create(machine)).pid == before[0]
    assert processes(machine.id) == before
    assert (await engine.inspect(machine.id)).state is State.RUNNING


async def test_a_machine_whose_directory_was_deleted_can_still_be_found_and_killed(
    root: Path, engine: QemuEngine
) -> None:
    machine = machine_on(root)
    await daemon_dies(root, machine.id)
    shutil.rmtree(root / "vms" / machine.id)
    (seen,) = await engine.inventory()
    assert (seen.id, seen.state) == (machine.id, State.UNRESPONSIVE)
    await engine.kill(machine.id)
    await engine.remove(machine.id)
    assert processes(machine.id) == []
    assert await engine.inventory() == []
