"""The Debian image as its users know it: user data, ssh, exec, cp, console, and files that stay."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.platform import Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(420)]

USER_DATA = """#cloud-config
users:
  - default
  - {name: ada, ssh_authorized_keys: [ssh-ed25519 AAAAada ada]}
write_files:
  - {path: /etc/greeting, content: "hello from user data\\n", permissions: "0640"}
  - {path: /root/packed, content: aGVsbG8=, encoding: b64}
ntp: {enabled: true}
runcmd:
  - echo "shell $(cat /etc/greeting)" > /root/ran
  - [sh, -c, "exit 7"]
"""


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform() as one:
        one.up()
        one.run("image", "build", "debian", timeout=400)
        user_data = tmp_path_factory.mktemp("seed") / "user-data"
        user_data.write_text(USER_DATA)
        one.run("launch", "debian", "--name", "web", "--memory", "512M", "--disk", "3G", "--user-data", str(user_data),
                "--timeout", "180s", timeout=200)  # fmt: skip
        yield one


def await_ready(platform: Platform) -> None:
    """The boot of ``web`` is done. A look costs the guest CPU that it boots with: not too often."""

    def ready() -> bool:
        return platform.run("exec", "web", "--", "test", "-e", "/run/corral/ready", check=False).returncode == 0

    wait_until(ready, 180, "the guest's boot to be done", every=2)


def test_user_data_has_run(debian: Platform) -> None:
    await_ready(debian)
    said = debian.text(
        "exec", "web", "--", "sh", "-c", "cat /root/ran /root/packed; stat -c %a /etc/greeting; hostname"
    )
    assert said == "shell hello from user data\nhello640\nweb\n"
    assert debian.text("exec", "web", "--", "cat", "/home/ada/.ssh/authorized_keys") == "ssh-ed25519 AAAAada ada\n"
    log = debian.text("exec", "web", "--", "cat", "/var/log/corral-init.log")
    assert "left out: ntp" in log
    assert "runcmd 2 ended with status 7" in log
    assert "left out: ntp" in debian.text("logs", "web")


def test_it_is_up_with_nothing_failed_and_one_host_key(debian: Platform) -> None:
    script = "timeout 60 systemctl is-system-running --wait; systemctl is-active ssh ssh.socket; systemctl --failed --no-legend --plain"
    done = debian.run("exec", "web", "--", "sh", "-c", f"{script}; ls /etc/ssh/ssh_host_*.pub | wc -l", check=False)
    assert done.stdout.split() == [b"running", b"inactive", b"active", b"1"]
    assert "10.0.2.15/24" in debian.text("exec", "web", "--", "ip", "-4", "addr")


def test_its_machine_id_is_its_own(debian: Platform) -> None:
    assert (
        debian.text("exec", "web", "--", "cat", "/etc/machine-id")
        == f"{debian.vm('web')['meta']['id'].replace('-', '')}\n"
    )


def test_the_disk_has_the_size_that_was_asked_for(debian: Platform) -> None:
    size = int(debian.text("exec", "web", "--", "sh", "-c", "df -B1 --output=size / | tail -1"))
    assert 2.7e9 < size < 3.3e9


def test_exec_passes_bytes_and_status_unchanged(debian: Platform) -> None:
    data = random.Random(1).randbytes(48 << 20)
    done = debian.run("exec", "-i", "web", "--", "cat", stdin=data, timeout=200)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert debian.run("exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7", check=False).returncode == 7
    assert debian.run("exec", "web", "--", "sh", "-c", "kill -TERM $$", check=False).returncode == 128 + 15
    missing = debian.run("exec", "web", "--", "no-such-program", check=False)
    assert missing.returncode == 127
    late = debian.run("exec", "--timeout", "1s", "web", "--", "sleep", "60", check=False)
    assert late.returncode == 124
    context = debian.text(
        "exec",
        "--user",
        "nobody",
        "--cwd",
        "/tmp",
        "--env",
        "A=b c",
        "web",
        "--",
        "sh",
        "-c",
        'echo "$(id -un) $PWD $A"',
    )
    assert context == "nobody /tmp b c\n"


def test_twenty_execs_at_once(debian: Platform) -> None:
    def one(number: int) -> str:
        return debian.text(
            "exec", "-i", "web", "--", "sh", "-c", f"read x; echo {number} $x", stdin=b"%d\n" % (number * 7)
        )

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == [f"{n} {n * 7}\n" for n in range(20)]


def test_ssh_with_the_key_that_corral_made(debian: Platform) -> None:
    assert debian.text("ssh", "web", "--", "hostname; exit 0", timeout=60) == "web\n"
    assert debian.run("ssh", "web", "--", "exit 9", check=False, timeout=60).returncode == 9


def test_a_tree_copied_in_and_out_is_the_same(debian: Platform, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "bytes").write_bytes(os.urandom(300_000))
    (source / "a file").write_text("with a space\n")
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("a file")
    debian.run("cp", "-r", str(source), "web:/root/tree")
    debian.run("cp", "-r", "web:/root/tree", str(tmp_path / "back"))
    difference = subprocess.run(
        ["diff", "-r", "--no-dereference", source, tmp_path / "back"], capture_output=True, check=False
    )
    assert difference.stdout == b""
    assert (tmp_path / "back" / "run.sh").stat().st_mode & 0o777 == 0o755
    assert os.readlink(tmp_path / "back" / "link") == "a file"


def test_console_is_a_terminal_that_answers(debian: Platform) -> None:
    done = debian.run("console", "web", "--until", "login:", "--timeout", "30s", stdin=b"\n", timeout=60)
    assert b"login:" in done.stdout


def test_guest_reaches_out_and_is_reached(debian: Platform) -> None:
    """Outgoing traffic: to a server on this machine, by the gateway's address."""
    server = subprocess.Popen(
        ["python3", "-c", "import http.server as h; s=h.HTTPServer(('127.0.0.1',0),h.SimpleHTTPRequestHandler);"
         "print(s.server_port,flush=True); s.serve_forever()"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/")  # fmt: skip
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        program = f"import urllib.request as u; print(u.urlopen('http://10.0.2.2:{port}/', timeout=20).status)"
        assert debian.text("exec", "web", "--", "python3", "-c", program) == "200\n"
    finally:
        server.kill()
        server.wait()


def test_limits_of_the_disk_hold_while_the_guest_runs(debian: Platform) -> None:
    await_ready(debian)
    script = "read a x </proc/uptime; dd if=/dev/vda of=/dev/null bs=4k count=300 iflag=direct 2>/dev/null"

    def seconds() -> float:
        words = debian.text("exec", "web", "--", "sh", "-c", f"{script}; read b x </proc/uptime; echo $a $b").split()
        return float(words[1]) - float(words[0])

    changes = debian.json("vm", "set", "web", "disk.root.iops=100")["changes"]
    assert [(one["field"], one["effect"]) for one in changes] == [("disk.root.iops", "live")]
    wait_until(lambda: seconds() > 2.6, 60, "300 reads to take three seconds")
    assert seconds() > 2.6
    debian.run("vm", "set", "web", "disk.root.iops=none")
    wait_until(lambda: seconds() < 1.3, 60, "300 reads to take less than half as long")


def test_a_file_survives_stop_and_start_and_user_data_runs_once(debian: Platform) -> None:
    debian.run("exec", "web", "--", "sh", "-c", "echo kept > /root/kept; rm /root/ran; sync")
    debian.run("stop", "web", "--timeout", "90s")
    assert debian.phase("web") == "stopped"
    debian.run("vm", "set", "web", "disk.root.size=4G")
    debian.run("start", "web", "--timeout", "180s", timeout=200)
    assert debian.text("exec", "web", "--", "cat", "/root/kept") == "kept\n"
    assert debian.text("exec", "web", "--", "blockdev", "--getsize64", "/dev/vda") == f"{4 << 30}\n"
    await_ready(debian)
    assert debian.run("exec", "web", "--", "test", "-e", "/root/ran", check=False).returncode == 1


def test_launches_that_fit_a_template_are_forked_and_each_is_somebody_of_its_own(debian: Platform) -> None:
    debian.run("template", "create", "debian", "--memory", "384M", "--timeout", "300s", timeout=320)
    for name in ("first", "second"):
        said = debian.text("launch", "debian", "--name", name, "--memory", "384M", "--timeout", "60s", timeout=80)
        assert "forked from debian-1x384m" in said
    script = "hostname; cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub; cat /sys/class/net/e*/address; "
    script += "cat /proc/sys/kernel/random/uuid; ip -4 -o addr show scope global | awk '{print $4}'; systemctl is-system-running"
    people = [debian.text("exec", name, "--", "sh", "-c", script).splitlines() for name in ("web", "first", "second")]
    assert [len(person) for person in people] == [7, 7, 7], people
    for what in range(5):
        assert len({person[what] for person in people}) == 3, [person[what] for person in people]
    assert [(person[0], person[5]) for person in people[1:]] == [("first", "10.0.2.15/24"), ("second", "10.0.2.15/24")]
    for person in people[1:]:
        assert person[1] == debian.vm(person[0])["meta"]["id"].replace("-", "")
        assert person[6] in ("running", "degraded")
    assert debian.text("ssh", "second", "--", "hostname; exit 0", timeout=60) == "second\n"
    asleep_until_asked(debian, "first")
    debian.run("delete", "first", "second", "--force")
    debian.run("template", "delete", "debian-1x384m")


def asleep_until_asked(debian: Platform, fork: str) -> None:
    """In a fork the services of the network are stopped; D-Bus starts them, and they leave its card alone."""
    units = "systemd-networkd systemd-resolved qemu-guest-agent"
    active = f"systemctl is-active {units}; exit 0"
    assert debian.text("exec", fork, "--", "sh", "-c", active).split() == ["inactive"] * 3
    assert debian.text("exec", "web", "--", "sh", "-c", active).split() == ["active", "active", "inactive"]
    called = "org.freedesktop.network1 /org/freedesktop/network1 org.freedesktop.network1.Manager ListLinks"
    asked = f"busctl call {called} >/dev/null && resolvectl status >/dev/null && networkctl --no-legend list; echo $?"
    found = debian.text("exec", fork, "--", "sh", "-c", asked)
    assert ("unmanaged" in found, found.split()[-1]) == (True, "0"), found
    assert debian.text("exec", fork, "--", "sh", "-c", active).split() == ["active", "active", "inactive"]
    assert debian.text("exec", fork, "--", "cat", "/etc/resolv.conf") == "nameserver 10.0.2.3\n"


def test_a_panic_is_told_by_the_guest_itself(debian: Platform) -> None:
    debian.run("vm", "set", "web", "restart=never")
    debian.run("exec", "--timeout", "5s", "web", "--", "sh", "-c", "echo c > /proc/sysrq-trigger", check=False)
    wait_until(lambda: debian.phase("web") == "error", 30, "the panic to be told")
    assert debian.vm("web")["status"]["cause"] == "guest-panic"
