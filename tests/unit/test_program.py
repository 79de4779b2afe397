"""Programs of this machine: bounded, and never left behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from corral.errors import CorralError, TimedOut, Unavailable
from corral.runtime.program import Limits, run_program

MIB = 1 << 20


def alive(pid_file: Path) -> bool:
    """Whether the process whose number stands in the file still runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{int(pid_file.read_text())}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_output_and_status_come_back() -> None:
    done = await run_program(["sh", "-c", "echo out; echo err >&2; exit 3"], what="trying", timeout_s=10, check=False)
    assert (done.status, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


async def test_a_failure_shows_the_last_words() -> None:
    with pytest.raises(CorralError, match=r"frobnicating failed \(sh, status 3\): no such knob") as caught:
        await run_program(["sh", "-c", "echo no such knob >&2; exit 3"], what="frobnicating", timeout_s=10)
    assert caught.value.code == "failed"


async def test_a_program_that_is_not_installed() -> None:
    with pytest.raises(Unavailable, match="not installed"):
        await run_program(["no-such-program-here"], what="trying", timeout_s=10)


async def test_the_deadline_ends_the_program_and_its_children(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/parent; wait"
    with pytest.raises(TimedOut, match="waiting took longer"):
        await run_program(["sh", "-c", script], what="waiting", timeout_s=0.5)
    assert not alive(tmp_path / "parent")
    assert not alive(tmp_path / "child")


async def test_cancelling_ends_the_program(tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid; exec sleep 60"
    task = asyncio.create_task(run_program(["sh", "-c", script], what="waiting", timeout_s=60))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(tmp_path / "pid")


async def test_too_much_output_is_an_error_not_memory() -> None:
    with pytest.raises(CorralError, match="more than 1000 bytes"):
        await run_program(["head", "-c", str(64 * MIB), "/dev/zero"], what="reading", timeout_s=30, max_output=1000)


async def test_limits_hold(tmp_path: Path) -> None:
    argv = ["dd", "if=/dev/zero", f"of={tmp_path}/out", "bs=1M", "count=8"]
    with pytest.raises(CorralError, match=r"signal|File too large"):
        await run_program(argv, what="writing", timeout_s=30, limits=Limits(file_size=MIB))
    assert (tmp_path / "out").stat().st_size <= MIB
    with pytest.raises(CorralError, match="signal"):
        await run_program(["sh", "-c", "while :; do :; done"], what="spinning", timeout_s=30, limits=Limits(cpu_s=1))


async def test_lines_are_told_as_they_come() -> None:
    lines: list[str] = []
    await run_program(
        ["sh", "-c", "printf 'one\\ntwo\\rthree' >&2"], what="talking", timeout_s=10, on_line=lines.append
    )
    assert lines == ["one", "two"]


async def test_the_environment_is_small_and_speaks_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LD_PRELOAD_OF_THE_CALLER", "x")
    done = await run_program(["env"], what="looking", timeout_s=10, env={"MORE": "yes"})
    names = {line.partition("=")[0] for line in done.stdout.decode().splitlines()}
    assert {"PATH", "LC_ALL", "MORE"} <= names
    assert not {"LANG", "LD_PRELOAD_OF_THE_CALLER"} & names
    assert os.environ["LANG"] == "de_DE.UTF-8"
