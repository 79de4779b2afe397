"""Freezing and forking, interrupted at every step: by the death of the daemon, of the holder, of QEMU itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from corral.engine.protocol import Drive, Machine, State
from corral.engine.qemu.fork import freeze, ram
from corral.engine.qemu.fork.keeper import Keeper
from corral.engine.qemu.machine import QemuMachine
from corral.errors import CorralError
from corral.runtime import Runtime, process
from corral.runtime.points import ENGINE_POINTS, FORK_POINTS, FREEZE_POINTS, TAKE_POINTS
from tests.contract.test_engine import REAL, RealHost
from tests.contract.test_engine_fork import fork_of, frozen, overlay

pytestmark = pytest.mark.skipif(not REAL, reason="QEMU is not here")
FREEZE = [point for point in FREEZE_POINTS if point.startswith("engine.")]
FORK = [point for point in FORK_POINTS if point.startswith("engine.")]

DAEMON = textwrap.dedent(
    """
    import asyncio, os, signal, sys
    from pathlib import Path
    from corral.engine.protocol import Drive, Layer, Machine
    from corral.engine.qemu.engine import QemuEngine
    from corral.engine.qemu.record import as_path
    from corral.runtime import Runtime
    from corral.runtime.faults import KillAt
    import msgspec

    async def main(root, work, text):
        engine = QemuEngine(root / "vms", root, Runtime(faults=KillAt.from_environment()))
        read = lambda kind: msgspec.json.decode(text, type=kind, dec_hook=as_path)
        if work == "freeze":
            id, template, overlays = read(tuple[str, str, dict[str, Drive]])
            await engine.freeze(id, template, overlays)
        else:
            machine = read(Machine)
            if work == "take":
                await engine.warm(machine, lambda: asyncio.sleep(0.1))
            await engine.create(machine, warm=work == "take")
            await engine.resume(machine.id)
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
    """
)


class At:
    """Does something whenever a point is reached."""

    def __init__(self) -> None:
        self.point = ""
        self.act: Callable[[], None] = lambda: None

    async def at(self, point: str) -> None:
        if point == self.point:
            self.act()


@pytest.fixture
def at() -> At:
    return At()


@pytest.fixture
async def host(at: At) -> AsyncIterator[RealHost]:
    root = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    root.chmod(0o711)
    made = RealHost(root, Runtime(faults=at))
    yield made
    for seen in await made.engine.inventory():
        await made.engine.kill(seen.id)
        await made.engine.remove(seen.id)
    for template in await made.engine.templates():
        await made.engine.discard(template.id)
    await made.close()
    assert [path for path in (root / "templates").glob("*") if path.is_dir()] == []
    async with asyncio.timeout(10):
        while holders(root):
            await asyncio.sleep(0.05)
    shutil.rmtree(root)


def holders(root: Path) -> list[int]:
    """Holder processes of this state directory."""
    place = str(root / "templates")
    return [pid for pid in process.pids() if process.working_directory(pid) == place]


def checksum(root: Path, template: str) -> str:
    """Of a template's memory as it is now."""
    fd = Keeper(root / "templates").get(template)
    assert fd is not None
    try:
        return ram.digest(fd)
    finally:
        os.close(fd)


async def daemon_dies(root: Path, work: str, what: object, point: str) -> None:
    """A daemon does the work and is killed: at the point, or when it is done."""
    text = msgspec.json.encode(what, enc_hook=str).decode()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(root), work, text, env={**os.environ, "CORRAL_KILL_AT": point}
    )
    assert await child.wait() == -signal.SIGKILL


def overlays_of(host: RealHost, machine: Machine, name: str) -> dict[str, Drive]:
    return {drive.name: overlay(host, machine, drive, f"{drive.name}-{name}.qcow2") for drive in machine.drives}


@pytest.mark.parametrize("point", FREEZE)
async def test_a_freeze_whose_daemon_dies_is_finished_by_the_next(host: RealHost, point: str) -> None:
    machine = await host.started()
    pid = (await host.engine.inspect(machine.id)).pid
    id, overlays = host.rt.random.id(), overlays_of(host, machine, "new")
    await host.engine.close()  # one daemon at a time: QMP serves one
    await daemon_dies(host.root, "freeze", (machine.id, id, overlays), point)
    await host.restart()
    seen = await host.engine.inspect(machine.id)
    assert (seen.state, seen.pid) == (State.RUNNING, pid), "the machine was left standing"
    template = await host.engine.freeze(machine.id, id, overlays)
    assert (template.stale, template.loaded) == ("", True)
    assert [one.id for one in await host.engine.templates()] == [id]
    child = fork_of(host, template)
    await host.engine.create(child)
    await host.engine.resume(child.id)
    await frozen(host, msgspec.structs.replace(machine, drives=tuple(overlays.values())))


@pytest.mark.parametrize("point", FREEZE)
async def test_a_freeze_that_nobody_finishes_leaves_nothing(host: RealHost, point: str) -> None:
    machine = await host.started()
    id, overlays = host.rt.random.id(), overlays_of(host, machine, "new")
    await host.engine.close()
    await daemon_dies(host.root, "freeze", (machine.id, id, overlays), point)
    await host.restart()
    await host.engine.kill(machine.id)
    await host.engine.remove(machine.id)
    templates = await host.engine.templates()
    assert [one.id for one in templates] == ([id] if point == "engine.freeze.recorded" else [])


@pytest.mark.parametrize("point", FORK)
async def test_a_fork_whose_daemon_dies_is_found_and_its_cable_is_out(host: RealHost, point: str) -> None:
    template, _ = await frozen(host, await host.started())
    child = fork_of(host, template)
    await host.engine.close()
    await daemon_dies(host.root, "fork", child, point)
    await host.restart()
    found = await host.engine.inspect(child.id)
    assert (found.state, found.template) == (State.CREATED, template.id)
    assert (await host.engine.create(child)).pid == found.pid
    await host.engine.resume(child.id)
    assert (await host.engine.inspect(child.id)).state is State.RUNNING


@pytest.mark.parametrize("point", FREEZE)
async def test_a_machine_that_dies_while_it_is_frozen(host: RealHost, at: At, point: str) -> None:
    machine = await host.started()
    pid = (await host.engine.inspect(machine.id)).pid
    assert pid is not None
    at.point, at.act = point, lambda: os.kill(pid, signal.SIGKILL)
    whole = point in ("engine.freeze.finished", "engine.freeze.recorded")
    overlays = overlays_of(host, machine, "new")
    if whole:
        template = await host.engine.freeze(machine.id, host.rt.random.id(), overlays)
        assert (await host.engine.create(fork_of(host, template))).state is State.CREATED
    else:
        with pytest.raises(CorralError):
            await host.engine.freeze(machine.id, host.rt.random.id(), overlays)
        assert await host.engine.templates() == []
        assert [path for path in (host.root / "templates").glob("*") if path.is_dir()] == []
    now = msgspec.structs.replace(machine, drives=tuple(overlays.values()))
    await host.becomes(machine.id, State.EXITED)
    assert (await host.engine.create(now)).state is State.CREATED, "its disks cannot be used any more"


@pytest.mark.parametrize(
    ("point", "again"),
    [
        ("engine.freeze.prepared", False),
        ("engine.freeze.copied", True),
        ("engine.freeze.switched", False),
        ("engine.freeze.switched", True),
    ],
)
async def test_a_machine_that_is_silent_in_the_middle_of_its_freeze_runs_and_is_frozen_again(
    host: RealHost, at: At, point: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``again``: what is frozen then is the same template, else another one."""
    monkeypatch.setitem(QemuMachine.command.__kwdefaults__, "timeout", 1.5)
    monkeypatch.setattr(freeze, "_SLOW_S", 1.5)
    machine = await host.started()
    pid = (await host.engine.inspect(machine.id)).pid
    assert pid is not None
    at.point, at.act = point, lambda: os.kill(pid, signal.SIGSTOP)
    id, overlays = host.rt.random.id(), overlays_of(host, machine, "new")
    with pytest.raises(CorralError):
        await host.engine.freeze(machine.id, id, overlays)
    at.point = ""
    os.kill(pid, signal.SIGCONT)
    await host.becomes(machine.id, State.RUNNING)
    assert (await host.engine.inspect(machine.id)).pid == pid
    now = msgspec.structs.replace(machine, drives=await host.engine.drives(machine.id))
    switched = now.drives == tuple(overlays.values())  # QEMU does what it was told while it stood still
    assert switched or (point != "engine.freeze.switched" and now.drives == machine.drives)
    if switched:
        overlays = overlays_of(host, now, "next")
    template = await host.engine.freeze(machine.id, id if again else host.rt.random.id(), overlays)
    layers = len(template.machine.drives[0].chain)
    assert layers == len(machine.drives[0].chain) + (switched and not again), "not what lay under its overlay"
    assert (await host.engine.create(fork_of(host, template))).state is State.CREATED
    if switched and not again:
        await host.engine.discard(id)


@pytest.mark.parametrize("point", FREEZE)
async def test_a_holder_that_dies_costs_no_template(host: RealHost, at: At, point: str) -> None:
    def kill() -> None:
        for pid in holders(host.root):
            os.kill(pid, signal.SIGKILL)

    machine = await host.started()
    before = (await host.engine.inspect(machine.id)).pid
    at.point, at.act = point, kill
    template, now = await frozen(host, machine)
    assert (await host.engine.inspect(machine.id)).pid == before
    kill()
    (seen,) = await host.engine.templates()
    assert (seen.loaded, seen.stale) == (False, "")
    assert (await host.engine.create(fork_of(host, template))).state is State.CREATED
    (seen,) = await host.engine.templates()
    assert seen.loaded
    await frozen(host, now)


async def test_a_copy_on_disk_that_is_damaged_is_noticed(host: RealHost) -> None:
    template, _ = await frozen(host, await host.started())
    for pid in holders(host.root):
        os.kill(pid, signal.SIGKILL)
    with (host.root / "templates" / template.id / "ram").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    with pytest.raises(CorralError) as caught:
        await host.engine.create(fork_of(host, template))
    assert caught.value.code == "stale"
    (seen,) = await host.engine.templates()
    assert "damaged" in seen.stale


async def test_an_end_in_the_middle_of_a_fork_leaves_template_and_siblings_alone(host: RealHost) -> None:
    template, _ = await frozen(host, await host.started())
    sibling = fork_of(host, template)
    await host.engine.create(sibling)
    await host.engine.resume(sibling.id)
    for point in ("", *FORK):
        child = fork_of(host, template)
        await host.engine.close()
        await daemon_dies(host.root, "fork", child, point)
        await host.restart()
        await host.engine.kill(child.id)
        await host.engine.remove(child.id)
    assert checksum(host.root, template.id) == template.digest
    assert (await host.engine.inspect(sibling.id)).state is State.RUNNING


@pytest.mark.parametrize("point", ["", *ENGINE_POINTS, "engine.fork.loaded", "engine.warm.running", *TAKE_POINTS])
async def test_a_warm_machine_whose_daemon_dies_is_nobodys_or_the_vms(host: RealHost, point: str) -> None:
    template, _ = await frozen(host, await host.started())
    wanted = fork_of(host, template)
    await host.engine.close()
    await daemon_dies(host.root, "take", wanted, point)
    await host.restart()
    left = list(process.with_arguments(b"-uuid", wanted.id.encode()))
    pool = await host.engine.pool()
    assert len(left) == (0 if point == "engine.spawn.dir" else 1)
    if point in ("", "engine.take.recorded"):
        assert pool == []
        seen = await host.engine.inspect(wanted.id)
        assert (seen.pid, seen.state) == (left[0], State.CREATED if point else State.RUNNING)
        assert (await host.engine.create(wanted, warm=True)).pid == left[0]
        return
    if left:
        assert [seen.id for seen in pool] == [wanted.id]
        assert (await host.engine.inspect(wanted.id)).state is State.ABSENT
    made = await host.engine.create(wanted)
    assert made.state is State.CREATED
    assert made.pid not in left
    assert list(process.with_arguments(b"-uuid", wanted.id.encode())) == [made.pid]
