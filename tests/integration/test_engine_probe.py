"""The probe says what really works, and a started machine is confined as promised."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from corral.engine.protocol import Drive, Machine, State
from corral.engine.qemu import command, probe_guest
from corral.engine.qemu.engine import QemuEngine
from corral.engine.qemu.launcher import FIRST_UID, Privileges
from corral.engine.qemu.probe import probe, run_guest, try_accelerator
from corral.errors import CorralError, Refused
from corral.runtime import Runtime, process
from tests.probed import as_probed
from tests.tiny_guests import disk

QEMU = shutil.which("qemu-system-x86_64") or ""
pytestmark = pytest.mark.skipif(not QEMU, reason="QEMU is not here")
SOURCE = Path(probe_guest.__file__).with_name("probe_guest.S")


@pytest.fixture
def root() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


async def test_software_emulation_runs_the_tiny_guest(root: Path) -> None:
    works, reason = await try_accelerator(root, Runtime(), "tcg", QEMU)
    assert works
    assert "ran to its end" in reason


async def test_a_guest_that_does_not_get_on_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halted = bytearray(probe_guest.rom())
    halted[:2] = b"\xeb\xfe"  # jmp to itself: what a hypervisor that hangs looks like
    monkeypatch.setattr(probe_guest, "rom", lambda: bytes(halted))
    began = time.monotonic()
    assert (await run_guest(root, "tcg", "qemu64", QEMU, 0.5))[:2] == (None, "")
    assert time.monotonic() - began < 3
    assert list(root.iterdir()) == []


async def test_a_probe_dies_with_its_daemon(root: Path) -> None:
    """The guest stands still for ever: only the end of its parent can end it."""
    script = (
        "import asyncio, sys; from pathlib import Path; from corral.engine.qemu import probe, probe_guest\n"
        "halted = b'\\xfa\\xf4' + probe_guest.rom()[2:]\n"
        "probe_guest.rom = lambda: halted\n"
        "asyncio.run(probe.run_guest(Path(sys.argv[1]), 'tcg', 'qemu64', sys.argv[2], 60.0))"
    )
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(root), QEMU)
    async with asyncio.timeout(20):
        while not (found := _standing_in(root)):
            await asyncio.sleep(0.05)
        daemon.kill()
        await daemon.wait()
        while _standing_in(root):
            await asyncio.sleep(0.05)
    assert found
    await run_guest(root, "tcg", "qemu64", QEMU, 20.0)
    assert list(root.iterdir()) == []


def _standing_in(root: Path) -> list[int]:
    return [pid for pid in process.pids() if process.working_directory(pid).startswith(f"{root}/")]


async def test_a_hypervisor_that_ends_by_itself_is_quoted(root: Path) -> None:
    status, _, words = await run_guest(root, "tcg", "no-such-cpu", QEMU, 5.0)
    assert status == 1
    assert "no-such-cpu" in words


async def test_the_answer_is_kept_until_the_host_boots_again(root: Path) -> None:
    rt = Runtime()
    first = await probe(root, rt)
    assert first.accelerator in ("kvm", "tcg")
    assert {one.name for one in first.probes} == {"kvm", "tcg"}
    assert await probe(root, rt) == first
    kept = msgspec.json.decode((root / "probe.json").read_bytes())
    (root / "probe.json").write_bytes(msgspec.json.encode(kept | {"boot_id": "another"}))
    assert (await probe(root, rt)).probes[1].at > first.probes[1].at
    (root / "probe.json").write_bytes(b"{ damaged")
    assert (await probe(root, rt)).accelerator == first.accelerator


async def test_without_a_hypervisor_the_hint_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(Refused) as caught:
        await probe(root, Runtime())
    assert caught.value.code == "unsupported"
    assert "install QEMU" in caught.value.hint


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objcopy")), reason="no assembler here")
def test_the_bytes_of_the_tiny_guest_are_those_of_its_source(tmp_path: Path) -> None:
    built, image = tmp_path / "g.o", tmp_path / "g.rom"
    subprocess.run(["gcc", "-c", "-m64", "-x", "assembler-with-cpp", str(SOURCE), "-o", str(built)], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(built), str(image)], check=True)
    assert image.read_bytes() == probe_guest.rom()


@pytest.fixture
async def engine(root: Path) -> AsyncIterator[QemuEngine]:
    as_probed(root)
    made = QemuEngine(root / "vms", root, Runtime())
    yield made
    for seen in await made.inventory():
        await made.kill(seen.id)
        await made.remove(seen.id)
    await made.close()


async def started(engine: QemuEngine, root: Path) -> tuple[Path, int]:
    """A machine's directory and pid."""
    id = Runtime().random.id()
    directory = root / "vms" / id
    directory.mkdir(parents=True)
    for path in (root / "vms", directory):
        path.chmod(0o711)
    drive = Drive(name="root", path=disk(directory / "root.raw", "idle"), format="raw", bootable=True)
    seen = await engine.create(Machine(id=id, name="tiny", memory=64 << 20, drives=(drive,)))
    assert seen.state is State.CREATED
    assert seen.pid is not None
    return directory, seen.pid


@pytest.mark.skipif(not Privileges.here().namespaces, reason="only root with mounts of its own can separate VMs so")
async def test_a_vm_of_root_is_nobody_and_sees_next_to_nothing(engine: QemuEngine, root: Path) -> None:
    uids = set()
    for directory, pid in [await started(engine, root), await started(engine, root)]:
        status = dict(line.split(":\t", 1) for line in _lines(pid, "status") if ":\t" in line)
        uid = int(status["Uid"].split()[0])
        assert uid >= FIRST_UID
        assert status["Uid"].split() == status["Gid"].split() == [str(uid)] * 4
        uids.add(uid)
        assert status["Groups"].split() == []
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert status["NSpid"].split()[-1] == "1"
        for kind in ("mnt", "pid", "ipc", "uts"):
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        assert sorted(os.listdir(f"/proc/{pid}/root/dev")) == ["null", "urandom"]
        assert any(line.split()[:5] == ["Max", "core", "file", "size", "0"] for line in _lines(pid, "limits"))
        run = (directory / "run").stat()
        assert (run.st_mode & 0o777, run.st_uid) == (0o700, 0)
        writable = {line.split()[1] for line in _lines(pid, "mounts") if "rw" in line.split()[3].split(",")}
        assert writable == {str(directory), "/proc"}
    assert len(uids) == 2


async def test_every_vm_is_without_new_privileges_and_in_the_sandbox(engine: QemuEngine, root: Path) -> None:
    _, pid = await started(engine, root)
    status = dict(line.split(":\t", 1) for line in _lines(pid, "status") if ":\t" in line)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert os.getsid(pid) != os.getsid(0)


async def test_a_start_without_the_sandbox_fails(
    engine: QemuEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.probe()
    monkeypatch.setattr(command, "SANDBOX", "on,no-such-filter=deny")
    with pytest.raises(CorralError) as caught:
        await started(engine, root)
    assert caught.value.code == "engine"
    assert await engine.inventory() == []


def _lines(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().splitlines()
