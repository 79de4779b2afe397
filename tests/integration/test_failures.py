"""What befalls real VMs: each failure is noticed in its stated time, named, and handled by the policy."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.agent.failure import TABLE, Cause
from corral.agent.settings import Settings
from corral.host.cgroup import choose
from tests.integration.guest_programs import spin
from tests.integration.platform import Platform, wait_until
from tests.tiny_guests import WRITER_CHUNK, WRITER_CHUNKS, disk

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]
SETTINGS = Settings(
    heartbeat_s=1.0, heartbeat_timeout_s=2.0, hang_patience_s=2.0, silent_patience_s=6.0, stall_retry_s=1.0,
    backoff_s=0.5,
)  # fmt: skip
"""Impatient, so that minutes pass in seconds. The times of the table follow from it."""
SLOW = 3.0
"""These machines may be busy with other things: what is stated for an idle host may take this many times as long."""


@pytest.fixture(scope="module")
def impatient() -> Iterator[Platform]:
    with Platform(settings=SETTINGS) as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        one.run("launch", "micro", "--name", "victim", "--memory", "192M")
        yield one


@pytest.fixture
def victim(impatient: Platform) -> Platform:
    """The one VM of these tests, running and not blamed for anything that was before."""
    status = impatient.vm("victim")["status"]
    if status["phase"] != "running" or status["failures"]:
        impatient.run("stop", "victim", "--force")
        impatient.run("start", "victim")
    return impatient


def status(platform: Platform, name: str = "victim") -> dict[str, Any]:
    return dict(platform.vm(name)["status"])


def until_called(platform: Platform, cause: Cause, *, name: str = "victim", slower: float = 1.0) -> dict[str, Any]:
    """Wait until a VM is said to suffer from something: at most the stated time on a slow host."""
    wait_until(
        lambda: status(platform, name)["cause"] == cause, TABLE[cause].within(SETTINGS) * SLOW * slower,
        f"{name} to be called {cause}",
    )  # fmt: skip
    return status(platform, name)


def until_running(platform: Platform, *, other_than: int | None = None, name: str = "victim") -> dict[str, Any]:
    """Wait until it runs and all is well, in another process than that one."""

    def runs() -> bool:
        now = status(platform, name)
        return now["phase"] == "running" and not now["cause"] and now["pid"] != other_than

    wait_until(runs, 60, f"{name} to run")
    return status(platform, name)


def events(platform: Platform, reason: str) -> list[str]:
    """Messages of the events of a kind about the victim, oldest first."""
    found = [e for e in platform.json("event", "list") if e["spec"]["reason"] == reason]
    return [e["spec"]["message"] for e in sorted(found, key=lambda e: e["meta"]["revision"])]


def abandoned(platform: Platform, *command: str) -> None:
    """Have something run in the guest that will not come back."""
    process = platform.popen("exec", "victim", "--", *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def test_three_panics_in_a_row_are_poison_until_a_person_starts_it(victim: Platform) -> None:
    for count in range(1, 4):
        pid = until_running(victim)["pid"]
        # The agent answers before all drivers are there; without pvpanic a panic would be a hang.
        waits = "for n in $(seq 50); do grep -q pvpanic_mmio /proc/modules && break; sleep 0.1; done"
        abandoned(victim, "sh", "-c", f"{waits}; echo c > /proc/sysrq-trigger")
        wait_until(lambda n=count: status(victim)["failures"] == n, 5 * SLOW, "the panic to be counted")
        if count < 3:
            until_running(victim, other_than=pid)
    now = status(victim)
    assert (now["phase"], now["cause"], now["pid"], now["retry_at"]) == ("error", "guest-panic", None, None)
    told = events(victim, "GuestPanic")
    assert len(told) == 3
    assert "Kernel panic" in told[0], "the last lines of its console"
    assert "guest-panic" in victim.text("info", "victim")
    time.sleep(2)
    assert status(victim)["phase"] == "error"
    victim.run("start", "victim")
    assert status(victim)["failures"] == 0


def test_a_guest_that_hangs_is_told_or_started_again_as_its_owner_wants(victim: Platform) -> None:
    pid = status(victim)["pid"]
    victim.run("vm", "set", "victim", "on_hang=report")
    victim.run("exec", "-i", "victim", "--", "sh", "-c", "cat > /tmp/spin; chmod 755 /tmp/spin", stdin=spin())
    abandoned(victim, "/tmp/spin")
    now = until_called(victim, Cause.GUEST_HANG)
    assert (now["phase"], now["pid"]) == ("unresponsive", pid)
    time.sleep(2 * SETTINGS.hang_patience_s)
    assert status(victim)["pid"] == pid, "only told"
    victim.run("vm", "set", "victim", "on_hang=restart")
    until_running(victim, other_than=pid)
    assert len(events(victim, "GuestHang")) == 1


def test_a_guest_whose_agent_was_ended_inside_is_left_alone(victim: Platform) -> None:
    pid = status(victim)["pid"]
    script = "mv /usr/local/sbin/corral-guest /tmp; kill $(pidof corral-guest)"
    abandoned(victim, "sh", "-c", script)
    until_called(victim, Cause.AGENT_GONE)
    time.sleep(2 * SETTINGS.hang_patience_s)
    now = status(victim)
    assert (now["phase"], now["cause"], now["pid"]) == ("unresponsive", "agent-gone", pid)


def test_a_stopped_qemu_is_called_silent_and_may_come_back(victim: Platform) -> None:
    pid = until_running(victim)["pid"]
    os.kill(pid, signal.SIGSTOP)
    until_called(victim, Cause.QEMU_SILENT)
    os.kill(pid, signal.SIGCONT)
    assert until_running(victim)["pid"] == pid, "it was not given up"


def test_a_qemu_that_stays_silent_is_replaced(victim: Platform) -> None:
    pid = until_running(victim)["pid"]
    os.kill(pid, signal.SIGSTOP)
    until_called(victim, Cause.QEMU_SILENT)
    until_running(victim, other_than=pid)
    assert "its QEMU did not answer" in events(victim, "Exited")[-1]


def test_a_killed_qemu_is_called_so(victim: Platform) -> None:
    pid = until_running(victim)["pid"]
    os.kill(pid, signal.SIGKILL)
    until_running(victim, other_than=pid)
    assert "signal 9" in events(victim, "QemuKilled")[-1]


def test_an_end_for_memory_is_told_from_a_kill(victim: Platform) -> None:
    groups = choose(victim.state)
    vm = victim.vm("victim")
    used = groups.memory_usage(vm["meta"]["id"])
    if used is None:
        pytest.skip(f"memory cannot be limited here: {groups.describe()}")
    groups.memory_limit(vm["meta"]["id"], used + (4 << 20))
    abandoned(victim, "sh", "-c", "mkdir /tmp/m; mount -t tmpfs m /tmp/m; dd if=/dev/zero of=/tmp/m/f bs=1M count=110")
    until_running(victim, other_than=vm["status"]["pid"])
    assert events(victim, "OutOfMemory")[-1].startswith("the kernel ended its QEMU for memory")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_vm_on_a_full_disk_stands_still_and_goes_on_without_loss(impatient: Platform) -> None:
    vms = impatient.state / "vms"
    image = disk(impatient.state / "writer.raw", "writer")
    impatient.run("image", "import", str(image), "--name", "writer", "--format", "raw")
    impatient.run("delete", "victim", "--force")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=711", "small", str(vms)], check=True)
    try:
        ballast = vms / "ballast"
        ballast.write_bytes(bytes(24 << 20))
        impatient.run("launch", "writer", "--name", "writer", "--memory", "64M")
        now = until_called(impatient, Cause.DISK_FULL, name="writer", slower=3)
        assert now["phase"] == "unresponsive"
        time.sleep(3 * SETTINGS.stall_retry_s)
        assert (now["pid"], len(events(impatient, "DiskFull"))) == (status(impatient, "writer")["pid"], 1)
        ballast.unlink()
        until_running(impatient, name="writer")
        wait_until(lambda: "W" in impatient.text("logs", "writer"), 60, "the guest to have written all")
        impatient.run("stop", "writer", "--force")
        assert written(next(vms.glob("*/root.qcow2")), impatient.state / "copy.raw") == WRITER_CHUNKS
        impatient.run("delete", "writer", "--force")
    finally:
        subprocess.run(["umount", "-l", str(vms)], check=True)


def written(overlay: Path, copy: Path) -> int:
    """How many chunks of the writer's disk are as it wrote them."""
    subprocess.run([shutil.which("qemu-img") or "qemu-img", "convert", "-O", "raw", overlay, copy], check=True)
    data = copy.read_bytes()
    size = WRITER_CHUNK
    return sum(
        data[n * size : (n + 1) * size] == struct.pack("<I", n) * (size // 4) for n in range(1, WRITER_CHUNKS + 1)
    )
