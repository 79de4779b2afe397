"""`corral run` and sandboxes on real guests: statuses, limits, files, and that nothing is left, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

import corral.sync
from corral.errors import CorralError, NotFound, TimedOut
from tests.integration.platform import Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]
SMALL = ("--memory", "128M")


def nothing_left(platform: Platform, seconds: float = 60) -> None:
    """No VM, process, file or control group of a run is left."""
    wait_until(lambda: platform.json("list") == [], seconds, "the VM of the run to be gone")
    platform.assert_nothing_left()


def started(platform: Platform, *words: str) -> subprocess.Popen[bytes]:
    """A run whose program says that it is there and then waits; returns when it has."""
    run = platform.popen(
        "run", *SMALL, *words, "micro", "--", "sh", "-c", "echo there; sleep 1000",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == b"there\n"
    return run


def ended(run: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    _, err = run.communicate(timeout=120)
    return run.returncode, err


def test_streams_status_and_no_network(shared: Platform) -> None:
    script = "cat; echo sorry >&2; ls /sys/class/net; exit 7"
    done = shared.run("run", *SMALL, "-i", "micro", "--", "sh", "-c", script, stdin=b"given\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"given\nlo\n", b"sorry\n")
    nothing_left(shared)


@pytest.mark.parametrize(
    ("program", "status", "why"),
    [("no-such-program", 127, b"not found"), ("/etc/passwd", 126, b"Permission denied")],
)
def test_a_program_that_cannot_be_started_is_told_as_a_shell_does(
    shared: Platform, program: str, status: int, why: bytes
) -> None:
    done = shared.run("run", *SMALL, "micro", "--", program, check=False)
    assert (done.returncode, done.stdout) == (status, b"")
    assert program.encode() in done.stderr
    assert why in done.stderr
    assert done.stderr.count(b"\n") == 1, done.stderr
    nothing_left(shared)


def test_signals_are_the_programs(shared: Platform) -> None:
    run = started(shared)
    run.send_signal(signal.SIGTERM)
    assert ended(run) == (128 + signal.SIGTERM, b"")
    nothing_left(shared)


def test_a_run_that_takes_too_long_is_killed_with_all_that_it_started(shared: Platform) -> None:
    done = shared.run(
        "run", *SMALL, "--timeout", "3s", "micro", "--", "sh", "-c", "while :; do :; done & sleep 1000", check=False
    )
    assert done.returncode == 124
    assert b"error: sh took longer than 3.0s and was killed" in done.stderr
    nothing_left(shared)


def test_a_killed_run_leaves_nothing(shared: Platform) -> None:
    run = started(shared)
    assert len(shared.qemus()) == 1
    run.kill()
    run.communicate()
    nothing_left(shared)


@pytest.mark.parametrize(
    ("script", "reasons"),
    [
        ("echo c > /proc/sysrq-trigger; sleep 1000", (b"panic", b"does not answer")),
        ("poweroff -f; sleep 1000", (b"the guest powered off",)),
    ],
)
def test_a_guest_that_is_over_ends_the_run_and_is_the_reason(
    shared: Platform, script: str, reasons: tuple[bytes, ...]
) -> None:
    done = shared.run("run", *SMALL, "micro", "--", "sh", "-c", script, check=False)
    assert done.returncode == 125
    assert any(reason in done.stderr for reason in reasons), done.stderr
    nothing_left(shared)


def test_files_go_in_and_come_out_whatever_the_status(shared: Platform, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "in.txt").write_text("words\n")
    done = shared.run(
        "run", *SMALL, "--cp", f"{tmp_path}/job:/root/", "--cp-out", f"/root/job/out.txt:{tmp_path}/out.txt",
        "--cwd", "/root/job", "micro", "--", "sh", "-c", "tr a-z A-Z < in.txt > out.txt; exit 3", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, b"")
    assert (tmp_path / "out.txt").read_text() == "WORDS\n"
    nothing_left(shared)


def test_a_mount_is_a_copy_that_comes_back(shared: Platform, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "deep").mkdir(parents=True)
    (work / "in.txt").write_text("words\n")
    (work / "deep" / "gone").write_text("")
    (work / "out").symlink_to("/etc")
    script = "tr a-z A-Z < in.txt > out.txt; rm -r deep; mkdir new; echo 1 > new/one; ! touch /mnt/ro/x 2>/dev/null"
    sealed = tmp_path / "ro"
    sealed.mkdir()
    done = shared.run(
        "run", *SMALL, "--mount", f"{work}:/work", "--mount", f"{sealed}:ro", "--cwd", "/work", "micro", "--",
        "sh", "-c", script, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(os.listdir(work)) == ["in.txt", "new", "out", "out.txt"]
    assert (work / "out.txt").read_text() == "WORDS\n"
    assert os.readlink(work / "out") == "/etc"
    assert os.listdir(sealed) == []
    nothing_left(shared)


@pytest.fixture(scope="module")
def sandbox(shared: Platform) -> Any:
    """One for the tests from here on: those above look for what is left, and this would be."""
    with corral.sync.connect(state=shared.state) as client, corral.sync.sandbox("micro", client=client) as vm:
        yield vm


def test_a_sandbox_bounds_what_its_programs_take(sandbox: corral.sync.Sandbox) -> None:
    flooded = sandbox.run("yes", max_output="1M")
    assert (flooded.status, len(flooded.stdout), flooded.limit) == (137, 1 << 20, "output")
    with pytest.raises(TimedOut):
        sandbox.run("sleep", "1000", timeout=1)
    assert sandbox.run("sh", "-c", "echo $0 $WHO; pwd", env={"WHO": "me"}, cwd="/tmp").text == "sh me\n/tmp\n"
    with pytest.raises(CorralError) as caught:
        sandbox.run("no-such-program")
    assert (caught.value.code, caught.value.details["status"]) == ("guest", 127)


def test_a_fork_bomb_gets_the_processes_it_may_have_and_no_more(sandbox: corral.sync.Sandbox) -> None:
    bomb = sandbox.run("sh", "-c", "b() { b | b & }; b; sleep 2; ls -d /proc/[0-9]* | wc -l", processes=40)
    assert bomb.limit == "processes"
    with pytest.raises(TimedOut):
        sandbox.run("sh", "-c", "setsid sleep 1000 & sleep 1000 & wait", processes=30, timeout=2)
    wait_until(lambda: b"sleep 1000" not in sandbox.run("ps").stdout, 20, "what it started to be killed with it")
    calm = sandbox.run("sh", "-c", "for n in 1 2 3 4 5; do sleep 0.1 & done; wait; echo done", processes=20)
    assert (calm.text, calm.limit) == ("done\n", "")


def test_files_of_a_sandbox(sandbox: corral.sync.Sandbox, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    sandbox.put(data, "/root/data")
    assert sandbox.get("/root/data") == data
    with pytest.raises(CorralError, match="larger"):
        sandbox.get("/root/data", max_output="1K")
    with pytest.raises(CorralError, match="No such file"):
        sandbox.get("/root/nothing")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "leaf").write_text("green")
    sandbox.copy_in(tmp_path / "tree", "/root/")
    sandbox.run("sh", "-c", "cp -r /root/tree /root/copy; echo brown > /root/copy/deep/leaf", check=True)
    sandbox.copy_out("/root/copy", tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "leaf").read_text() == "brown\n"


def test_a_sandbox_whose_qemu_is_killed_says_so(shared: Platform) -> None:
    with corral.sync.connect(state=shared.state) as client, corral.sync.sandbox("micro", client=client) as vm:
        pid = client.vms.get(vm.id).status["pid"]
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(CorralError) as caught:
            vm.run("sleep", "1000")
    assert not isinstance(caught.value, NotFound)
    assert vm.name in caught.value.message


def test_a_killed_daemon_ends_the_run_and_still_removes_everything(platform: Platform) -> None:
    run = started(platform)
    platform.kill()
    status, err = ended(run)
    assert status == 125
    assert b"the connection to the daemon was lost" in err
    platform.up()
    nothing_left(platform)
