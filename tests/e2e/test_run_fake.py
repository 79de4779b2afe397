"""`corral run` as a person and a script use it: statuses, streams, limits, and nothing left behind. On the fake engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_cli_fake import at_a_terminal, expect
from tests.integration.platform import Platform, alive, wait_until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def here(shared: Platform) -> Platform:
    shared.run("image", "build", "micro")
    return shared


def nothing_left(platform: Platform, seconds: float = 30) -> None:
    """The VM of a run goes when the run does, or a little later if that was killed."""
    wait_until(lambda: platform.json("list") == [], seconds, "the VM of the run to be gone")
    platform.assert_nothing_left()


def hanging(platform: Platform, *words: str, **options: Any) -> subprocess.Popen[bytes]:
    """A run whose program waits for input that does not come; returns when it reads."""
    run = platform.popen(
        "run", "-i", *words, "micro", "--", "cat",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(b"ready\n")
    run.stdin.flush()
    assert run.stdout.readline() == b"ready\n"
    return run


def ended(run: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Wait for the end of a run whose input stays open; its status and stderr."""
    assert run.stderr is not None
    status = run.wait(60)
    return status, run.communicate()[1]


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ("run micro -- echo hello", 0, b"hello\n", b""),
        ("run micro echo hello", 0, b"hello\n", b""),
        ("run --rm micro -- false", 1, b"", b""),
        ("run micro -- sh -c 'exit 7'", 7, b"", b""),
        ("run micro -- nothing-like-it", 127, b"", b"nothing-like-it"),
        ("run micro -- /etc/passwd", 126, b"", b"Permission denied"),
        ("run nosuch -- true", 125, b"", b"nosuch"),
        ("run micro", 2, b"", b"which program"),
        ("run --net nowhere micro -- true", 125, b"", b"nowhere"),
        ("run --cpus 0 micro -- true", 125, b"", b"spec.cpu.count"),
        ("run --cp x micro -- true", 2, b"", b"HOST:/GUEST"),
        ("run --cp-out x:y micro -- true", 2, b"", b"/GUEST:HOST"),
        ("run --max-output much micro -- true", 2, b"", b"not a size"),
        ("run --cp /no/such:/x micro -- true", 125, b"", b"/no/such"),
    ],
)
def test_the_status_is_the_programs_and_errors_are_125_but_126_and_127_as_in_a_shell(
    here: Platform, words: str, status: int, out: bytes, err: bytes
) -> None:
    import shlex

    done = here.run(*shlex.split(words), check=False)
    assert (done.returncode, done.stdout) == (status, out)
    assert err in done.stderr
    assert bool(done.stderr) == bool(err), done.stderr
    nothing_left(here)


def test_an_image_that_is_not_here_is_built_first(fresh: Platform) -> None:
    fresh.up()
    done = fresh.run("run", "micro", "--", "echo", "built")
    assert done.stdout == b"built\n"
    assert b"micro: building it" in done.stderr


def test_stdin_goes_in_and_ends(here: Platform) -> None:
    data = os.urandom(3 << 20)
    assert here.run("run", "-i", "micro", "--", "cat", stdin=data).stdout == data


def test_without_i_the_program_reads_nothing(here: Platform) -> None:
    assert here.run("run", "micro", "--", "cat", stdin=b"unread").stdout == b""


def test_a_program_that_takes_too_long_is_killed_and_that_is_said(here: Platform) -> None:
    run = hanging(here, "--timeout", "1s")
    status, err = ended(run)
    assert status == 124
    assert b"error: cat took longer than 1.0s and was killed" in err
    nothing_left(here)


def test_a_flood_is_cut_off_and_that_is_said(here: Platform) -> None:
    done = here.run("run", "-i", "--max-output", "1M", "micro", "--", "cat", stdin=bytes(4 << 20), check=False)
    assert (done.returncode, len(done.stdout)) == (137, 1 << 20)
    assert b"error: cat printed more than 1M and was killed" in done.stderr
    whole = here.run("run", "-i", "--max-output", "none", "micro", "--", "cat", stdin=bytes(4 << 20))
    assert len(whole.stdout) == 4 << 20
    nothing_left(here)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_the_programs(here: Platform, number: int) -> None:
    run = hanging(here)
    run.send_signal(number)
    assert ended(run) == (128 + number, b"")
    nothing_left(here)


def test_a_killed_run_leaves_nothing(here: Platform) -> None:
    run = hanging(here)
    assert [vm["spec"]["ephemeral"] for vm in here.json("list")] == [True]
    run.kill()
    run.communicate()
    nothing_left(here)
    reasons = [e["spec"]["reason"] for e in here.json("event", "list")]
    assert "Abandoned" in reasons


def test_a_terminal_that_is_closed_ends_the_run(here: Platform) -> None:
    master, slave, run = at_a_terminal(here, "run", "-it", "micro", "cat")
    os.write(master, b"typed")
    expect(master, b"typed")
    os.close(slave)
    os.close(master)
    run.wait(30)
    nothing_left(here)


def test_a_reader_that_goes_away_ends_the_run(here: Platform) -> None:
    run = hanging(here)
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        for _ in range(64):
            run.stdin.write(bytes(1 << 16))
    assert run.wait(30) == 141
    nothing_left(here)


def test_a_vm_that_is_deleted_under_a_run_is_said(here: Platform) -> None:
    run = hanging(here)
    (vm,) = here.json("list")
    here.run("delete", "--force", vm["meta"]["name"])
    status, err = ended(run)
    assert status == 125
    assert f"{vm['meta']['name']} was deleted".encode() in err


def test_keep_keeps_it(here: Platform) -> None:
    done = here.run("run", "--keep", "--name", "kept", "micro", "--", "true")
    assert b"kept: kept" in done.stderr
    time.sleep(7)
    assert here.text("exec", "kept", "--", "echo", "here") == "here\n"
    vm = here.vm("kept")
    assert (vm["spec"]["ephemeral"], vm["spec"]["nics"], vm["spec"]["restart"]) == (False, [], "never")
    here.run("delete", "--force", "kept")


@pytest.mark.parametrize(
    ("words", "status"), [("micro -- nothing-like-it", 127), ("--timeout 1s micro -- sleep infinity", 124)]
)
def test_a_kept_vm_is_named_whatever_became_of_the_program(here: Platform, words: str, status: int) -> None:
    done = here.run("run", "--keep", "--name", "stays", *words.split(), check=False)
    assert done.returncode == status
    assert b"kept: stays (corral exec stays -- sh; corral delete --force stays)" in done.stderr
    here.run("delete", "--force", "stays")


def test_a_kept_vm_is_named_when_the_run_is_ended(here: Platform) -> None:
    run = hanging(here, "--keep", "--name", "stays", "--timeout", "60s")
    run.send_signal(signal.SIGHUP)
    assert b"kept: stays" in ended(run)[1]
    here.run("delete", "--force", "stays")


def test_a_network_is_there_only_if_asked_for(here: Platform) -> None:
    run = hanging(here, "--net", "user", "--name", "netted")
    assert [nic["network"] for nic in here.vm("netted")["spec"]["nics"]] == ["user"]
    run.communicate()
    nothing_left(here)


def test_timings_name_the_stages(here: Platform) -> None:
    err = here.run("run", "--timings", "micro", "--", "true").stderr.decode()
    for stage in ("starting this command", "the request", "waiting for the guest", "the program", "all of it"):
        assert stage in err


def test_errors_are_problem_bodies_with_json(here: Platform) -> None:
    done = here.run("run", "-o", "json", "nosuch", "--", "true", check=False)
    assert json.loads(done.stdout)["code"] == "not-found"


@pytest.mark.parametrize("point", ["abandoned.found", "abandoned.recorded"])
def test_a_daemon_killed_after_the_run_still_removes_everything(fresh: Platform, point: str) -> None:
    """One that is killed before it: tests/integration/test_run.py, with real guests."""
    pid = fresh.up(CORRAL_KILL_AT=point)
    fresh.run("image", "build", "micro")
    run = hanging(fresh)
    run.kill()
    run.communicate()
    wait_until(lambda: not alive(pid), 40, f"the daemon to be killed at {point}")
    fresh.up()
    nothing_left(fresh, 60)


def test_a_sandbox_outlives_a_restart_of_the_daemon(fresh: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    import corral.sync

    fresh.up()
    fresh.run("image", "build", "micro")
    monkeypatch.setenv("CORRAL_AUTOSTART", "0")
    with corral.sync.connect(state=fresh.state) as client, corral.sync.sandbox("micro", client=client) as vm:
        fresh.kill()
        fresh.up()
        time.sleep(7)
        assert fresh.json("list")[0]["meta"]["id"] == vm.id
        assert fresh.json("list")[0]["meta"].get("deleted") is None
    nothing_left(fresh)


def lines(platform: Platform, *words: str, status: int = 0) -> list[dict[str, Any]]:
    done = platform.run("run", "-o", "json", *words, check=False, timeout=170)
    assert done.returncode == status, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_line_has_a_run_and_results_keep_the_order(here: Platform, tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_text("\n".join(["one", "", "two words", "{}", "three"]) + "\n")
    found = lines(here, "--each", str(file), "-j", "3", "micro", "--", "echo", "<{}>")
    assert [row["line"] for row in found] == ["one", "two words", "{}", "three"]
    assert [row["stdout"] for row in found] == ["<one>\n", "<two words>\n", "<{}>\n", "<three>\n"]
    assert all(row["status"] == 0 and row["seconds"] > 0 for row in found)
    fed = lines(here, "--each", str(file), "micro", "--", "cat")
    assert [row["stdout"] for row in fed] == ["one\n", "two words\n", "{}\n", "three\n"]
    text = here.text("run", "--each", str(file), "micro", "--", "echo", "{}").splitlines()
    assert [row.split()[0] for row in text] == ["0"] * 4
    assert text[1].endswith("two words  two words")
    nothing_left(here)


def test_a_run_of_each_that_fails_stops_no_other_unless_asked_to(here: Platform, tmp_path: Path) -> None:
    file = tmp_path / "statuses"
    file.write_text("0\n7\n0\n0\n0\n0\n")
    found = lines(here, "--each", str(file), "-j", "2", "micro", "--", "sh", "-c", "exit {}", status=1)
    assert [row["status"] for row in found] == [0, 7, 0, 0, 0, 0]
    fast = lines(here, "--each", str(file), "-j", "2", "--fail-fast", "micro", "--", "sh", "-c", "exit {}", status=1)
    assert [row["status"] for row in fast] == [0, 7]
    late = lines(here, "--each", str(file), "-j", "6", "--timeout", "1s", "micro", "--", "sleep", "infinity", status=1)
    assert {(row["status"], row["error"]) for row in late} == {(124, "sleep took longer than 1.0s and was killed")}
    assert max(row["seconds"] for row in late) < 30
    nothing_left(here)


def test_each_refuses_what_makes_no_sense(here: Platform, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xff\xfe\n")
    for words in (
        ["--each", "/no/such"],
        ["--each", str(tmp_path / "bad")],
        ["--each", "-", "-i"],
        ["--each", "-", "--keep"],
    ):
        assert here.run("run", *words, "micro", "--", "true", check=False).returncode == 2


def test_each_that_cannot_begin_ends_with_125(here: Platform, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("line\n")
    words = ["run", "--each", str(tmp_path / "file"), "micro", "--", "true"]
    done = here.run(*words, check=False, env={"CORRAL_URL": f"unix:{tmp_path}/nobody.sock"})
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"nobody.sock" in done.stderr


def test_each_says_where_the_time_of_all_runs_went(here: Platform, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("".join(f"{n}\n" for n in range(5)))
    done = here.run("run", "--timings", "--each", str(tmp_path / "file"), "micro", "--", "echo", "{}")
    rows = done.stderr.decode().splitlines()
    assert rows[0].split() == ["median", "p90", "of", "5", "runs"]
    stages = [row.split("ms")[2].strip() for row in rows[1:]]
    assert [stage for stage in stages if stage in ("the request", "waiting for the guest", "the program")]
    assert stages[-1] == "all of it"
    medians, ninths = zip(*((float(row.split()[0]), float(row.split()[2])) for row in rows[1:]), strict=True)
    assert all(median <= ninth for median, ninth in zip(medians, ninths, strict=True))
    nothing_left(here)


def test_each_ended_by_a_signal_leaves_nothing(here: Platform, tmp_path: Path) -> None:
    file = tmp_path / "many"
    file.write_text("".join(f"{n}\n" for n in range(20)))
    run = here.popen("run", "--each", str(file), "-j", "4", "micro", "--", "sleep", "infinity", stderr=subprocess.PIPE)
    wait_until(lambda: len(here.json("list", "--phase", "running")) >= 4, 30, "four runs at once")
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == 143
    nothing_left(here)


def test_each_shows_how_far_it_is_on_a_terminal(here: Platform, tmp_path: Path) -> None:
    file = tmp_path / "few"
    file.write_text("alpha\nbeta\n")
    master, slave, run = at_a_terminal(here, "run", "--each", str(file), "micro", "--", "echo", "{}")
    shown = expect(master, b"2/2")
    assert run.wait(30) == 0
    assert shown.index(b"alpha") < shown.index(b"beta")
    os.close(slave)
    os.close(master)


def test_a_thousand_runs_leave_nothing(here: Platform, tmp_path: Path) -> None:
    file = tmp_path / "thousand"
    file.write_text("".join(f"{n}\n" for n in range(1000)))
    before = descriptors(here.pid())
    found = lines(here, "--each", str(file), "-j", "16", "micro", "--", "echo", "{}")
    assert [row["stdout"] for row in found] == [f"{n}\n" for n in range(1000)]
    nothing_left(here)
    assert descriptors(here.pid()) <= before + 10


def descriptors(pid: int) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))
