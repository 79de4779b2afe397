"""The parts of freezing and forking, each by itself: pages, memory, holder, the filter in front of a fork's QEMU."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corral.engine.qemu import launcher
from corral.engine.qemu.engine import QemuEngine
from corral.engine.qemu.fork import freeze, ram
from corral.engine.qemu.fork.keeper import Keeper
from corral.engine.qemu.fork.pages import PAGE, Memory, Run, Unreadable, total
from corral.engine.qemu.fork.watch import Unwatchable
from corral.errors import CorralError
from corral.runtime import Runtime, process

SIZE = 1 << 24
MAPPED = textwrap.dedent(
    f"""
    import mmap, sys
    memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    print("ready", flush=True)
    for line in sys.stdin:
        page, byte = line.split()
        memory[int(page) * {PAGE}] = int(byte)
        print("done", flush=True)
    """
)


class Other:
    """A process with a private mapping, of which single bytes can be written."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child
        self.pidfd = os.pidfd_open(child.pid)

    def write(self, page: int, byte: int) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{page} {byte}\n")
        self.child.stdin.flush()
        assert self.child.stdout.readline() == "done\n"


@pytest.fixture
def other() -> Iterator[Other]:
    child = subprocess.Popen(
        [sys.executable, "-c", MAPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    one = Other(child)
    yield one
    os.close(one.pidfd)
    child.kill()
    child.communicate()


@contextmanager
def memory_of(other: Other) -> Iterator[Memory]:
    try:
        with Memory(other.child.pid, other.pidfd, SIZE) as memory:
            yield memory
    except PermissionError:
        pytest.skip("no right to look into another process")


def test_pages_of_its_own_are_found_and_copied(other: Other) -> None:
    for page in (0, 1, 2, 700, 4095):
        other.write(page, page % 251 + 1)
    with memory_of(other) as memory, mmap.mmap(-1, SIZE) as target:
        runs = memory.own()
        assert runs == [Run(0, 3 * PAGE), Run(700 * PAGE, 701 * PAGE), Run(4095 * PAGE, SIZE)]
        memory.copy(runs, target)
        assert [target[page * PAGE] for page in (0, 1, 2, 3, 700, 4095)] == [1, 2, 3, 0, 700 % 251 + 1, 4095 % 251 + 1]


def test_pages_of_zeros_are_left_out_of_a_sparse_copy(other: Other) -> None:
    other.write(5, 0)
    other.write(6, 7)
    fd = ram.make(SIZE)
    try:
        with memory_of(other) as memory, mmap.mmap(fd, SIZE) as target:
            assert total(memory.own()) == 2 * PAGE
            assert memory.copy_sparse(memory.own(), target) == PAGE
            assert target[6 * PAGE] == 7
        assert ram.held(fd) == PAGE
    finally:
        os.close(fd)


def test_only_what_was_written_since_the_last_look_is_told(other: Other) -> None:
    for page in range(64):
        other.write(page, 1)
    with memory_of(other) as memory:
        try:
            memory.watch()
        except Unwatchable as error:
            pytest.skip(f"writes cannot be noted here: {error}")
        assert memory.own() == [Run(0, 64 * PAGE)]
        assert memory.written() == []
        other.write(3, 2)
        other.write(1000, 2)
        assert memory.written() == [Run(3 * PAGE, 4 * PAGE), Run(1000 * PAGE, 1001 * PAGE)]
        assert memory.written() == []
        other.write(3, 3)  # written again after it was protected again
        memory.unwatch()
        memory.watch()
        assert memory.own() == [Run(0, 64 * PAGE), Run(1000 * PAGE, 1001 * PAGE)], "a new watch begins with everything"
    other.write(9, 9)  # and the process goes on


def test_a_process_that_ends_while_it_is_watched_is_an_error_not_a_hang(other: Other) -> None:
    other.write(1, 1)
    with memory_of(other) as memory, mmap.mmap(-1, SIZE) as target:
        runs = memory.own()
        other.child.kill()
        other.child.wait()
        with pytest.raises(Unreadable):
            memory.copy(runs, target)
    with pytest.raises((Unreadable, FileNotFoundError, ProcessLookupError)):
        Memory(other.child.pid, other.pidfd, SIZE)


def test_sealed_memory_takes_no_write_and_no_hole_and_can_still_be_mapped_privately() -> None:
    fd = ram.make(SIZE)
    try:
        os.pwrite(fd, b"template", PAGE)
        ram.seal(fd)
        ram.seal(fd)
        before = ram.digest(fd)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"damage", PAGE)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(SIZE)) == -1, "a hole"
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE)
        with mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[PAGE : PAGE + 5] = b"child"
            private[9 * PAGE] = 1  # fills the hole in the template too
        assert ram.held(fd) > PAGE
        assert ram.digest(fd) == before
    finally:
        os.close(fd)


def test_a_copy_on_disk_keeps_content_and_holes(tmp_path: Path) -> None:
    fd, path = ram.make(SIZE), tmp_path / "ram"
    copy = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, b"x" * 3 * PAGE, 5 * PAGE)
        ram.copy(fd, copy)
        assert (ram.digest(copy), path.stat().st_size) == (ram.digest(fd), SIZE)
        assert path.stat().st_blocks * 512 < SIZE // 4
        os.pwrite(copy, b"y", 6 * PAGE)
        assert ram.digest(copy) != ram.digest(fd)
    finally:
        os.close(fd)
        os.close(copy)


def test_the_holder_keeps_what_it_is_given_and_ends_with_the_last(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "templates")
    assert (keeper.get("a"), keeper.ids()) == (None, set())
    for id in ("a", "b"):
        fd = ram.make(PAGE)
        os.pwrite(fd, id.encode(), 0)
        keeper.put(id, fd)
        os.close(fd)
    assert Keeper(tmp_path / "templates").ids() == {"a", "b"}, "another daemon sees the same"
    found = keeper.get("b")
    assert found is not None
    assert os.pread(found, 1, 0) == b"b"
    os.close(found)
    (holder,) = [pid for pid in process.pids() if process.working_directory(pid) == str(tmp_path / "templates")]
    pidfd = os.pidfd_open(holder)
    keeper.drop("a")
    assert (keeper.get("a"), keeper.ids()) == (None, {"b"})
    keeper.drop("b")

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), "it still runs and keeps nothing"
    os.close(pidfd)
    fd = ram.make(PAGE)
    keeper.put("c", fd)  # and another one is started
    os.close(fd)
    keeper.drop("c")


def test_the_state_of_devices_is_taken_only_from_a_file_of_reasonable_size(tmp_path: Path) -> None:
    source, target = tmp_path / "frozen.state", tmp_path / "state"
    source.write_bytes(b"devices")
    freeze._take(source, target)
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"devices", 0o600)
    os.truncate(source, freeze.MAX_STATE + 1)  # by a QEMU that its guest has taken over
    with pytest.raises(CorralError, match="more than 16 MiB"):
        freeze._take(source, target)
    source.unlink()
    os.mkfifo(source)
    with pytest.raises(CorralError, match="is not the file"):
        freeze._take(source, target)
    source.unlink()
    source.symlink_to("/etc/shadow")
    with pytest.raises(OSError, match="symbolic links"):
        freeze._take(source, target)
    assert target.read_bytes() == b"devices"


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not"), (errno.ENOMEM, "no memory")]
)
async def test_what_the_system_refuses_while_freezing_is_told_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "templates"))

    engine = QemuEngine(tmp_path / "vms", tmp_path, Runtime())
    monkeypatch.setattr(engine._ground.shelf, "sweep", refuse)
    with pytest.raises(CorralError, match=os.strerror(number)) as caught:
        await engine.freeze("a", "b", {})
    assert hint in caught.value.hint
    await engine.close()


def test_behind_the_filter_a_hole_is_not_made_and_everything_else_works(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content" * 1000)
    script = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
with open(sys.argv[1], "r+b") as file:
    call = lambda mode, at, length: libc.fallocate(file.fileno(), mode, ctypes.c_long(at), ctypes.c_long(length))
    print(call(3, 0, 4096), call(0, 7000, 1000), flush=True)
"""
    read, report = os.pipe()
    with os.fdopen(read, "rb") as told:
        done = subprocess.run(
            [str(launcher.program()), f"report={report}", "spare=1", "--", sys.executable, "-c", script, str(path)],
            pass_fds=[report], capture_output=True, text=True, check=False,
        )  # fmt: skip
        os.close(report)
        os.waitpid(int(told.read()), 0)
    assert (done.stdout, done.stderr) == ("0 0\n", "")
    assert path.read_bytes() == b"content" * 1000 + bytes(1000)
