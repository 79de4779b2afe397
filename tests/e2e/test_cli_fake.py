"""The command line as a person and a script use it: answers, errors, exit statuses. On the fake engine."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.platform import CORRAL, Platform, alive, wait_until

pytestmark = pytest.mark.timeout(180)


def test_from_nothing_to_a_vm_in_one_command(fresh: Platform) -> None:
    """No daemon, no image: `launch` sees to both, says so on stderr, and prints only the answer."""
    done = fresh.run("launch", "micro", "--name", "first", env={"CORRAL_AUTOSTART": "1"}, timeout=170)
    assert done.stdout.startswith(b"first is running")
    assert b"corral exec first -- sh" in done.stdout
    assert done.stderr.count(b"started the daemon") == 1
    assert b"micro: building it" in done.stderr
    again = fresh.run("list", env={"CORRAL_AUTOSTART": "1"})
    assert again.stderr == b""


def test_commands_that_start_the_daemon_at_the_same_time_start_one(fresh: Platform) -> None:
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: fresh.run("list", env={"CORRAL_AUTOSTART": "1"}), range(6)))
    assert sum(b"started the daemon" in one.stderr for one in done) == 1
    assert len(fresh.processes()) == 1


def test_up_and_down(fresh: Platform) -> None:
    refused = fresh.run("list", check=False)
    assert (refused.returncode, refused.stdout) == (5, b"")
    assert b"error: no daemon" in refused.stderr
    assert b"hint: `corral up`" in refused.stderr
    assert f"unix:{fresh.state}/api.sock" in fresh.text("up")
    pid = fresh.pid()
    assert b"already" in fresh.run("up").stderr
    assert fresh.pid() == pid
    fresh.run("down")
    assert not alive(pid)
    assert b"no daemon" in fresh.run("down").stderr
    assert "pid" not in fresh.json("version"), "version starts nothing"


def test_a_daemon_that_cannot_start_says_why(fresh: Platform) -> None:
    (fresh.state / "store.db").mkdir()
    done = fresh.run("up", check=False)
    assert done.returncode == 5
    assert b"store.db" in done.stderr
    (fresh.state / "store.db").rmdir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_directory_of_somebody_else_is_refused(fresh: Platform) -> None:
    done = fresh.run("--state", "/root/corral", "up", check=False)
    assert done.returncode in (1, 4)


@pytest.fixture(scope="module")
def web(shared: Platform) -> Platform:
    shared.run("launch", "micro", "--name", "web", "--label", "role=front", "--memory", "96M", timeout=170)
    return shared


def test_list_in_every_format(web: Platform) -> None:
    assert web.text("list").splitlines()[0].split()[:3] == ["NAME", "PHASE", "IMAGE"]
    assert re.search(r"^web +running +micro +1 +96M", web.text("list"), re.MULTILINE)
    assert "ACCEL" in web.text("list", "-o", "wide")
    assert "web" in web.text("list", "-o", "name").split()
    (vm,) = [vm for vm in web.json("list") if vm["meta"]["name"] == "web"]
    assert vm["kind"] == "vm"
    assert set(vm["meta"]) >= {"id", "name", "project", "labels", "revision", "generation", "created"}
    assert vm["status"]["phase"] == "running"
    assert web.json("list", "-l", "role=front")[0]["meta"]["name"] == "web"
    assert web.json("list", "-l", "role=back") == []
    assert web.json("list", "--phase", "paused") == []
    assert json.loads(web.run("list", env={"CORRAL_OUTPUT": "json"}).stdout) != []


def test_info_by_name_id_prefix_and_project(web: Platform) -> None:
    vm = web.json("info", "web")
    for ref in (vm["meta"]["id"], vm["meta"]["id"][:8], "default/web"):
        assert web.json("info", ref)["meta"]["id"] == vm["meta"]["id"]
    text = web.text("info", "web")
    assert "phase:       running" in text
    assert "corral exec web -- sh" in text
    assert re.search(r"^RESOURCE +SETTING +ENTITLED +GRANTED +USED$", text, re.MULTILINE)
    assert re.search(r"^cpu +1 CPU, weight 100 +- +- +-$", text, re.MULTILINE)
    assert re.search(r"^memory +96M +96M ", text, re.MULTILINE)
    assert web.json("vm", "show", "web") == web.json("info", "web")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("info nobody", 3, "nobody"),
        ("info ..", 3, ""),
        ("info ../../etc/passwd", 3, ""),
        ("info -- -web", 3, ""),
        ("start nobody", 3, "nobody"),
        ("launch micro --name web", 4, "web"),
        ("launch nothing-like-it", 3, "nothing-like-it"),
        ("launch micro --name Bad_Name! --cpus 0 --memory 3", 4, "spec.cpu.count"),
        ("launch micro --memory much", 2, "not a size"),
        ("launch micro --publish 1", 2, "HOST:GUEST"),
        ("launch micro --memory 9999G", 4, "hint"),
        ("list --nope", 2, "--nope"),
        ("lisst", 2, "did you mean list"),
        ("vm lst", 2, "did you mean list"),
        ("delete", 2, "NAME"),
        ("delete --all", 2, "--yes"),
        ("delete web", 4, "--force"),
        ("image delete micro", 4, "web"),
        ("exec web", 2, "which program"),
        ("exec nobody -- true", 125, "nobody"),
        ("ssh nobody", 125, "nobody"),
        ("cp a b", 2, "NAME:/path"),
        ("cp /no/such/file web:/", 4, "/no/such/file"),
        ("cp /dev/zero web:/", 4, "/dev/zero"),
        ("cp /tmp web:/", 4, "-r"),
        ("explain vm.spec.nope", 3, "it has"),
        ("task cancel nobody", 3, "nobody"),
        ("image import /dev/zero --name x --format raw", 4, "regular"),
        ("image import /no/such.iso", 4, "no such file"),
        ("image build nothing", 2, "micro"),
        ("list -o xml", 2, "xml"),
        ("--url ftp://x list", 4, "ftp"),
        ("--url http://127.0.0.1:1 list", 5, "127.0.0.1:1"),
    ],
)
def test_errors_have_a_line_a_hint_and_a_status(web: Platform, words: str, status: int, said: str) -> None:
    done = web.run(*words.split(), check=False)
    assert (done.returncode, done.stdout) == (status, b"")
    lines = done.stderr.decode().splitlines()
    assert any(line.startswith("error: ") for line in lines), lines
    assert said in done.stderr.decode()
    if status != 125:
        assert any(line.startswith("hint: ") for line in lines), lines


def test_all_problems_are_told_at_once_one_a_line(web: Platform) -> None:
    done = web.run(
        "launch", "micro", "--name", "Bad!", "--cpus", "0", "--memory", "3", "--publish", "1:70000", check=False
    )
    assert done.returncode == 4
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert len(errors) >= 4
    for field in ("name", "spec.cpu.count", "spec.memory.size", "spec.nics"):
        assert any(field in line for line in errors)


def test_errors_as_json(web: Platform) -> None:
    for words in (["info", "nobody"], ["list", "--nope"], ["launch", "micro", "--cpus", "0"]):
        done = web.run(*words, "-o", "json", check=False)
        body = json.loads(done.stdout)
        assert body["code"] in ("not-found", "usage", "invalid")
        assert done.stderr.startswith(b"error: ")
    assert body["problems"][0]["field"] == "spec.cpu.count"


def test_several_names_go_on_after_an_error_and_end_with_the_worst(web: Platform) -> None:
    web.run("launch", "micro", "--name", "many", "--count", "2", "--memory", "96M")
    done = web.run("stop", "many-1", "nobody", "many-2", check=False)
    assert done.returncode == 3
    assert done.stdout == b"many-1: stopped\nmany-2: stopped\n"
    assert b"nobody" in done.stderr
    assert web.text("start", "many-1") == "many-1: running\n"
    assert web.run("delete", "many-1", check=False).returncode == 4
    assert web.text("delete", "many-1", "--force") == "many-1: deleted\n"
    assert "many-1" not in web.text("list", "-o", "name").split()
    web.run("delete", "many-2")


def test_dry_run_makes_nothing(web: Platform) -> None:
    assert b"would be made" in web.run("launch", "micro", "--name", "ghost", "--dry-run").stdout
    assert web.run("info", "ghost", check=False).returncode == 3


def test_create_start_pause_and_wait(web: Platform) -> None:
    assert web.text("vm", "create", "micro", "--name", "made", "--memory", "96M") == "made\n"
    assert web.text("vm", "wait", "made", "--for", "stopped") == "made: stopped\n"
    web.run("start", "made")
    web.run("vm", "pause", "made")
    assert web.phase("made") == "paused"
    explained = web.json("vm", "explain", "made")
    assert explained["hosts"]
    assert [finding["code"] for finding in explained["findings"]] == ["paused"]
    assert "corral resume made" in web.text("vm", "explain", "made")
    assert web.text("vm", "explain", "made", "-o", "name") == "paused\n"
    late = web.run("vm", "wait", "made", "--timeout", "300ms", check=False)
    assert late.returncode == 5
    assert b"paused" in late.stderr
    web.run("vm", "resume", "made")
    assert web.text("vm", "wait", "made") == "made: running\n"
    web.run("delete", "made", "--force")


def test_no_wait_and_waiting_for_the_task(web: Platform) -> None:
    done = web.run("launch", "micro", "--name", "later", "--memory", "96M", "--no-wait")
    assert b"starting" in done.stdout
    (task,) = [t for t in web.json("task", "list") if t["spec"]["target_name"] == "later"]
    assert "done" in web.text("task", "wait", task["meta"]["id"])
    web.run("delete", "later", "--force")


def test_without_a_terminal_each_step_is_a_plain_line(web: Platform) -> None:
    done = web.run("launch", "micro", "--name", "steps", "--memory", "96M")
    assert done.stderr
    assert b"\x1b" not in done.stderr + done.stdout
    assert all(line.startswith(b"steps: ") for line in done.stderr.splitlines())
    web.run("delete", "steps", "--force")


def test_ctrl_c_leaves_the_work_going_and_says_how_to_cancel_it(web: Platform) -> None:
    daemon = web.pid()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has those ignore it that it runs in the background
    launching = web.popen(
        "launch", "micro", "--name", "slow", "--memory", "96M", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert launching.stderr is not None
    first = launching.stderr.readline()  # the first step: it waits now
    os.kill(daemon, signal.SIGSTOP)  # a pretended guest would boot faster than a signal arrives on a busy machine
    launching.send_signal(signal.SIGINT)
    time.sleep(0.3)
    os.kill(daemon, signal.SIGCONT)
    out, err = launching.communicate(timeout=20)
    assert first.startswith(b"slow: ")
    assert (launching.returncode, out) == (130, b"")
    assert b"corral task cancel" in err
    assert b"Traceback" not in err
    assert web.text("vm", "wait", "slow") == "slow: running\n"
    web.run("delete", "slow", "--force")


def test_exec_status_streams_and_failures(web: Platform) -> None:
    assert web.text("exec", "web", "--", "echo", "-n", "x") == "-n x\n"
    assert web.run("exec", "web", "--", "sh", "-c", "exit 7", check=False).returncode == 7
    assert web.run("exec", "-i", "web", "cat", stdin=bytes(range(256)) * 4000).stdout == bytes(range(256)) * 4000
    late = web.run("exec", "-i", "--timeout", "20s", "web", "--", "cat", check=False, stdin=b"")
    assert late.returncode == 0, "cat ended with its input"
    paused = web.run("exec", "web", "--", "no-such-program", check=False)
    assert paused.returncode in (125, 126, 127)


def test_exec_timeout_is_124_and_signals_are_passed_on(web: Platform) -> None:
    reader, writer = os.pipe()
    try:
        late = web.popen("exec", "-i", "--timeout", "500ms", "web", "cat", stdin=reader, stderr=subprocess.PIPE)
        assert late.wait(20) == 124
        assert late.stderr is not None
        assert b"killed" in late.stderr.read()
        late.stderr.close()
        program = web.popen("exec", "-i", "web", "cat", stdin=reader, stdout=subprocess.PIPE)
        os.write(writer, b"ready\n")
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == 128 + signal.SIGTERM
        program.stdout.close()
    finally:
        os.close(reader)
        os.close(writer)


def test_a_closed_pipe_is_no_error(web: Platform) -> None:
    for words in (["list"], ["explain", "vm.spec"], ["event", "list", "-o", "json"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = web.popen(*words, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        _, err = done.communicate(timeout=20)
        assert (done.returncode, err) == (0, b"")


def test_a_full_disk_under_stdout_is_an_error(web: Platform) -> None:
    with open("/dev/full", "wb") as full:
        done = web.popen("list", stdout=full, stderr=subprocess.PIPE)
        _, err = done.communicate(timeout=20)
    assert done.returncode == 1
    assert err.startswith(b"error: ")


def test_closed_descriptors_and_bare_environments(web: Platform) -> None:
    command = f"{CORRAL} list -o name"
    for closing in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{command} {closing}"], env=web.env, capture_output=True, timeout=20, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
    bare = {
        "CORRAL_STATE": str(web.state),
        "CORRAL_AUTOSTART": "0",
        "LANG": "C",
        "LC_ALL": "C",
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run([CORRAL, "info", "web"], env=bare, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    strange = subprocess.run([CORRAL, "info", b"\xff\xfe"], env=web.env, capture_output=True, timeout=20, check=False)
    assert strange.returncode == 2
    assert b"UTF-8" in strange.stderr


def test_flavors_hosts_and_the_other_nouns(web: Platform) -> None:
    assert "plan" in web.text("flavor", "create", "plan", "--cpus", "1", "--memory", "128M")
    web.run("launch", "micro", "--name", "planned", "--flavor", "plan")
    assert web.vm("planned")["spec"]["memory"]["size"] == 128 << 20
    web.run("delete", "planned", "--force")
    assert web.text("flavor", "delete", "plan") == "plan: deleted\n"
    for noun in ("image", "flavor", "volume", "network", "project", "host", "task", "event"):
        items = web.json(noun, "list")
        assert isinstance(items, list)
        assert web.text(noun, "list").splitlines()[0].isupper()
        if items:
            assert web.json(noun, "show", items[0]["meta"]["id"])["meta"]["id"] == items[0]["meta"]["id"]
            assert items[0]["meta"]["id"] in web.text(noun, "show", items[0]["meta"]["id"])
    assert "VMs get" in web.text("host", "probe")
    assert web.json("doctor", check=False)[0]["name"] == "daemon"


def test_limits_of_a_disk_are_set_by_path_and_a_dry_run_says_what_is_impossible(web: Platform) -> None:
    web.run("image", "build", "debian")
    web.run("launch", "debian", "--name", "slow", "--disk", "2G", "--set", "disk.root.bandwidth=20M")
    changes = web.json("vm", "set", "slow", "disk.root.iops=500", "disk.bandwidth=10M/s", "disk.root.size=3G")[
        "changes"
    ]
    assert [(one["field"], one["before"], one["after"], one["effect"]) for one in changes] == [
        ("disk.root.bandwidth", 20 << 20, 10 << 20, "live"),
        ("disk.root.iops", None, 500, "live"),
        ("disk.root.size", 2 << 30, 3 << 30, "restart"),
    ]
    assert re.search(r"^disk: +3G, at most 500 iops, 10M/s$", web.text("info", "slow"), re.MULTILINE)
    dry = web.run("vm", "set", "slow", "disk.root.size=1G", "nic.0.rate=1M", "disk.iops=none", "--dry-run", check=False)
    lines = {line.split()[0]: line for line in dry.stdout.decode().splitlines()}
    assert dry.returncode == 4
    assert "impossible: a disk never shrinks" in lines["disk.root.size"]
    assert "impossible: user-mode networking cannot limit a card's rate" in lines["nic.0.rate"]
    assert lines["disk.root.iops"].split() == ["disk.root.iops", "500", "none", "at", "once"]
    web.run("vm", "set", "slow", "disk.root.iops_burst=600")
    beyond = web.run("vm", "set", "slow", "disk.root.iops=700", "--dry-run", check=False)
    assert (beyond.returncode, beyond.stdout, b"iops_burst" in beyond.stderr) == (4, b"", True)
    web.run("vm", "set", "slow", "disk.root.iops_burst=none")
    refused = web.run("vm", "set", "slow", "nic.0.rate=1M", check=False)
    assert (refused.returncode, b"nics[0].rate" in refused.stderr) == (4, True)
    assert web.run("vm", "set", "slow", "nic.3.rate=1M", check=False).returncode == 2
    assert web.vm("slow")["spec"]["disk"]["iops"] == 500
    web.run("vm", "set", "slow", "disk.root.iops=none")
    assert web.vm("slow")["spec"]["disk"]["iops"] is None
    assert "Bytes a second" in web.text("explain", "vm.spec.disk.root.bandwidth")
    web.run("flavor", "create", "slower", "--memory", "128M", "--disk-iops", "50", "--disk-bandwidth", "1M")
    assert web.json("flavor", "show", "slower")["spec"]["disk_bandwidth"] == 1 << 20
    web.run("flavor", "delete", "slower")
    web.run("delete", "slow", "--force")


def test_top_shows_who_runs_here(web: Platform) -> None:
    web.run("launch", "micro", "--name", "busy", "--set", "cpu.weight=300")
    seen = {vm["name"]: vm for vm in web.json("top")["vms"]}
    assert seen["busy"]["cpu"]["weight"] == 300
    assert seen["busy"]["cpu"]["used"] is None  # a pretended host has no CPU time
    lines = web.text("top", "--once").splitlines()
    assert any(line.split()[:2] == ["busy", "300"] for line in lines)
    assert web.text("top", "--projects").splitlines()[-1].split()[0] == "default"
    assert web.text("top", "-o", "name", "--sort", "name").splitlines() == sorted(seen)
    web.run("delete", "busy", "--force")
    end = time.monotonic() + 20
    while "busy" in web.text("top", "-o", "name").splitlines():  # an answer may be half a second old
        assert time.monotonic() < end


def test_event_watch_prints_what_happens(web: Platform) -> None:
    watching = web.popen("event", "watch", "-o", "json", stdout=subprocess.PIPE)
    try:
        time.sleep(1.0)
        web.run("launch", "micro", "--name", "noted", "--memory", "96M")
        assert watching.stdout is not None
        while json.loads(watching.stdout.readline())["spec"]["about_name"] != "noted":
            pass
    finally:
        watching.kill()
        watching.communicate()
    web.run("delete", "noted", "--force")


def test_all_asks_on_a_terminal_and_goes_ahead_with_yes(web: Platform) -> None:
    web.run("launch", "micro", "--name", "asked", "--memory", "96M", "--project", "default")
    master, slave = pty.openpty()
    asking = web.popen("stop", "--all", stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(slave)
    os.write(master, b"n\n")
    _, err = asking.communicate(timeout=30)
    os.close(master)
    assert asking.returncode == 130
    assert b"asked" in err
    assert web.phase("asked") == "running"
    web.run("stop", "--all", "--yes", "--force")
    assert web.phase("asked") == "stopped"
    web.run("delete", "asked")
    web.run("start", "web")


def at_a_terminal(platform: Platform, *words: str) -> tuple[int, int, subprocess.Popen[bytes]]:
    master, slave = pty.openpty()
    return master, slave, platform.popen(*words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)


def expect(master: int, text: bytes) -> bytes:
    """What the terminal shows, up to ``text``."""
    shown = b""
    until = time.monotonic() + 20
    while text not in shown:
        assert time.monotonic() < until, shown
        if select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 4096)
    return shown


def test_exec_with_a_terminal_is_raw_and_puts_everything_back(web: Platform) -> None:
    master, slave, program = at_a_terminal(web, "exec", "-it", "web", "cat")
    try:
        before = termios.tcgetattr(slave)
        wait_until(lambda: not termios.tcgetattr(slave)[3] & termios.ECHO, 20, "the terminal to be raw")
        os.write(master, b"typed\x03")
        assert b"\x03" in expect(master, b"\x03"), "Ctrl-C is the guest's"
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == 128 + signal.SIGTERM
        assert termios.tcgetattr(slave) == before
    finally:
        program.kill()
        os.close(master)
        os.close(slave)


def test_the_console_says_how_to_leave_it_and_puts_everything_back(web: Platform) -> None:
    master, slave, program = at_a_terminal(web, "console", "web")
    try:
        before = termios.tcgetattr(slave)
        expect(master, b"leave it with Ctrl-]")
        wait_until(lambda: not termios.tcgetattr(slave)[3] & termios.ECHO, 20, "the terminal to be raw")
        os.write(master, b"\x1dq")
        expect(master, b"left the console")
        assert program.wait(20) == 0
        assert termios.tcgetattr(slave) == before
    finally:
        program.kill()
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(web: Platform, shell: str) -> None:
    assert "_CORRAL_COMPLETE" in web.text("completion", shell)


def test_completion_completes(web: Platform) -> None:
    env = {"_CORRAL_COMPLETE": "bash_complete", "COMP_WORDS": "corral la", "COMP_CWORD": "1"}
    assert "launch" in web.run(env=env).stdout.decode()


def test_a_traceback_is_shown_only_on_request(fresh: Platform, tmp_path: Path) -> None:
    """A state directory that is a file: an error of the system's, told in a sentence."""
    (tmp_path / "file").write_text("")
    done = fresh.run("--state", str(tmp_path / "file" / "deeper"), "up", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
