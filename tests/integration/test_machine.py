"""Small truths of real VMs: what doctor says, published ports, restart policy, privileges, the serial log."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.integration.platform import Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]


def test_doctor_tells_the_truth_about_kvm(shared: Platform) -> None:
    checks = {check["name"]: check for check in shared.json("doctor", check=False)}
    host = shared.json("host", "list")[0]["status"]
    kvm = next((a for a in host["accelerators"] if a["name"] == "kvm"), None)
    assert host["accelerator"] in ("kvm", "tcg")
    assert (host["accelerator"] == "kvm") == (kvm is not None and kvm["works"])
    text = shared.text("doctor", check=False)
    if Path("/dev/kvm").exists() and host["accelerator"] == "tcg":
        assert "/dev/kvm" in text
        assert checks["accelerator"]["ok"] in (False, "warn")
    assert checks["qemu"]["ok"] is True


def test_every_vm_says_how_its_cpus_are_made(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "label", "--memory", "96M")
    assert shared.vm("label")["status"]["accelerator"] == shared.json("host", "list")[0]["status"]["accelerator"]
    shared.run("delete", "label", "--force")


def test_qemu_runs_without_privileges(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "small", "--count", "2", "--memory", "96M")
    owners = set()
    for pid in shared.qemus():
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert int(status["CapEff"], 16) == 0
        assert int(status["CapBnd"], 16) == 0 or os.getuid() != 0
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        owners.add(status["Uid"].split()[0])
    assert len(owners) == (2 if os.getuid() == 0 else 1)
    assert "0" not in owners
    shared.run("delete", "small-1", "small-2", "--force")


def test_a_published_port_reaches_the_guest(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "port", "--memory", "96M", "--publish", "0:8080")
    (port,) = [p for p in shared.vm("port")["status"]["ports"] if p["guest"] == 8080]
    server = shared.popen("exec", "port", "--", "sh", "-c", "while :; do echo served | nc -l -p 8080; done")
    try:

        def answer() -> bool:
            try:
                with socket.create_connection(("127.0.0.1", port["host"]), timeout=3) as connection:
                    return connection.recv(100) == b"served\n"
            except OSError:  # nobody listens in the guest yet
                return False

        wait_until(answer, 20, "an answer through the published port", every=0.5)
    finally:
        server.kill()
        server.wait()
    shared.run("delete", "port", "--force")


def test_a_taken_port_is_refused_with_its_number(shared: Platform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        done = shared.run(
            "launch", "micro", "--name", "taken", "--memory", "96M", "--publish", f"{number}:80", check=False
        )
        assert done.returncode != 0
        assert str(number) in done.stderr.decode()
    shared.run("delete", "taken", "--force")


def test_a_killed_qemu_is_started_again(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "phoenix", "--memory", "96M")
    first = shared.vm("phoenix")["status"]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(
        lambda: shared.phase("phoenix") == "running" and shared.vm("phoenix")["status"]["pid"] not in (None, first),
        60,
        "phoenix to be back",
    )
    assert shared.text("exec", "phoenix", "--", "echo", "risen") == "risen\n"
    reasons = [e["spec"]["reason"] for e in shared.json("event", "list") if e["spec"]["about_name"] == "phoenix"]
    assert "Exited" in reasons
    shared.run("delete", "phoenix", "--force")


def test_pause_reset_and_restart(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "mind", "--memory", "96M")
    boot = shared.text("exec", "mind", "--", "cat", "/proc/sys/kernel/random/boot_id")
    shared.run("vm", "pause", "mind")
    assert shared.phase("mind") == "paused"
    time.sleep(2)
    shared.run("vm", "resume", "mind")
    assert shared.text("exec", "mind", "--", "cat", "/proc/sys/kernel/random/boot_id") == boot
    drift = abs(int(shared.text("exec", "mind", "--", "date", "+%s")) - time.time())
    assert drift < 2
    pid = shared.vm("mind")["status"]["pid"]
    shared.run("vm", "reset", "mind")
    assert shared.text("exec", "mind", "--", "cat", "/proc/sys/kernel/random/boot_id") != boot
    assert shared.vm("mind")["status"]["pid"] == pid
    shared.run("restart", "mind")
    assert shared.vm("mind")["status"]["pid"] != pid
    shared.run("delete", "mind", "--force")


def test_the_serial_log_is_kept_and_bounded(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "loud", "--memory", "96M")
    shared.run("exec", "loud", "--", "sh", "-c", "echo a line for the log > /dev/ttyS0")
    wait_until(lambda: "a line for the log" in shared.text("logs", "loud"), 10, "the line to be in the log")
    shared.run(
        "exec",
        "--timeout",
        "8s",
        "loud",
        "--",
        "sh",
        "-c",
        "while :; do echo flood flood flood flood flood; done > /dev/ttyS0",
        check=False,
    )
    size = sum(f.stat().st_size for f in (shared.state / "vms").rglob("serial*") if f.is_file())
    assert size < 4 << 20
    shared.run("delete", "loud", "--force")


def test_delete_of_a_running_vm_is_refused(shared: Platform) -> None:
    shared.run("launch", "micro", "--name", "kept", "--memory", "96M")
    refused = shared.run("delete", "kept", check=False)
    assert refused.returncode == 4
    assert b"--force" in refused.stderr
    image = shared.run("image", "delete", "micro", check=False)
    assert image.returncode == 4
    assert b"kept" in image.stderr
    shared.run("delete", "kept", "--force")
