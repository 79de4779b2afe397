"""Memory of real guests: six with more than one and a half times the budget; under pressure idle ones pay, and get it back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.host.process import own
from corral.units import MIB
from tests.integration.platform import Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]
NAMES = [f"v-{number}" for number in range(1, 7)]
BUSY, IDLE, RESERVED = NAMES[:3], NAMES[3:5], NAMES[5]
SIZE, ADMITTED = 256 * MIB, 1920 * MIB
FILL = 125
"""MiB that a busy guest writes into its memory."""
SPARE = (len(BUSY) * FILL - 10) * MIB
"""The budget, beyond what six systems hold by themselves (850 to 960 MiB): not enough for what the busy ones write."""


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        (host,) = one.json("host", "list")
        name = host["meta"]["name"]
        one.run("host", "set", name, f"memory_budget={ADMITTED >> 20}M", "memory_overcommit=1")
        one.run("launch", "micro", "--count", "6", "--name", "v", "--memory", "256M", timeout=250)
        one.run("vm", "set", RESERVED, "memory.reserve=256M")
        time.sleep(3)  # what they freed while they booted comes back
        limit = held(one) + SPARE
        one.run(
            "host", "set", name, f"memory_budget={limit >> 20}M", f"memory_overcommit={ADMITTED / limit + 0.01:.3f}"
        )
        yield one


def held(platform: Platform) -> int:
    """Bytes that all guests hold."""
    return sum(own(platform.vm(name)["status"]["pid"]) or 0 for name in NAMES)


def budget(platform: Platform) -> int:
    (host,) = platform.json("host", "list")
    return int(host["spec"]["memory_budget"])


def memory(platform: Platform) -> dict[str, dict[str, Any]]:
    return {vm["name"]: vm["memory"] for vm in platform.json("top", "--once")["vms"]}


def granted(platform: Platform) -> list[int]:
    return [memory(platform)[name]["granted"] for name in NAMES]


def told(platform: Platform) -> set[str]:
    return {event["spec"]["reason"] for event in platform.json("event", "list")}


def groups(platform: Platform, name: str) -> list[Path]:
    id = platform.vm(name)["meta"]["id"]
    return [
        *Path("/sys/fs/cgroup").glob(f"**/{id}/memory.limit_in_bytes"),
        *Path("/sys/fs/cgroup").glob(f"**/{id}/memory.max"),
    ]


def test_what_does_not_fit_the_budget_and_its_overcommitment_is_refused(platform: Platform) -> None:
    refused = platform.run("launch", "micro", "--name", "more", "--memory", "256M", check=False)
    assert refused.returncode == 4
    assert b"memory: needs" in refused.stderr
    refused = platform.run("vm", "set", "v-1", "memory.reserve=257M", check=False)
    assert refused.returncode == 4
    assert b"spec.memory.reserve" in refused.stderr


def test_without_pressure_no_balloon_moves(platform: Platform) -> None:
    time.sleep(3)
    assert granted(platform) == [SIZE] * 6
    assert "MemoryPressure" not in told(platform)
    assert {one["guest_used"] for one in memory(platform).values()} == {None}, "nobody is asked what nobody needs"


def test_under_pressure_idle_guests_pay_reservations_hold_and_it_is_given_back_when_it_ends(platform: Platform) -> None:
    pids = {name: platform.vm(name)["status"]["pid"] for name in NAMES}
    fill = (
        f"mkdir -p /fill && mount -t tmpfs -o size=220M none /fill && dd if=/dev/urandom of=/fill/a bs=1M count={FILL}"
    )
    for name in BUSY:
        platform.run("exec", name, "--", "sh", "-c", f"{fill} && md5sum /fill/a > /sum")
    wait_until(lambda: all(memory(platform)[name]["granted"] < SIZE - 32 * MIB for name in IDLE), 30, "the idle to pay")
    time.sleep(3)
    now = memory(platform)
    assert all(now[name]["granted"] >= now[name]["guest_used"] > FILL * MIB for name in BUSY), "what is used is kept"
    assert max(now[name]["granted"] for name in IDLE) < min(now[name]["granted"] for name in BUSY)
    assert now[RESERVED]["granted"] == SIZE
    assert held(platform) <= budget(platform)
    assert "MemoryPressure" in told(platform)
    for name in BUSY:
        platform.run("exec", name, "--", "sh", "-c", "md5sum -c /sum && umount /fill")
    wait_until(lambda: granted(platform) == [SIZE] * 6, 30, "everything to be given back")
    assert {name: platform.vm(name)["status"]["pid"] for name in NAMES} == pids, "no QEMU was ended"
    for name in NAMES:
        log = platform.text("exec", name, "--", "dmesg")
        assert "Out of memory" not in log
        assert "oom-kill" not in log


def test_a_running_guest_is_made_smaller_and_larger_at_once_within_what_it_was_started_with(platform: Platform) -> None:
    wanted = platform.json("vm", "set", "v-1", "memory.size=160M", "--dry-run")
    assert [(one["field"], one["effect"]) for one in wanted["changes"]] == [("memory.size", "live")]
    platform.run("vm", "set", "v-1", "memory.size=160M")
    wait_until(lambda: memory(platform)["v-1"]["granted"] == 160 * MIB, 20, "the guest to give back memory")
    # What one gave back another can have, but not without a restart: its hardware is what it was started with.
    more = platform.json("vm", "set", "v-2", "memory.size=300M", "--dry-run")
    assert [one["effect"] for one in more["changes"]] == ["restart"]
    platform.run("vm", "set", "v-1", "memory.size=256M")
    wait_until(lambda: memory(platform)["v-1"]["granted"] == SIZE, 20, "the guest to have all of it again")


@pytest.mark.skipif(os.geteuid() != 0, reason="limits need control groups, and those need root")
def test_every_qemu_has_a_safety_net_far_above_what_it_takes(platform: Platform) -> None:
    for name in NAMES:
        for file in groups(platform, name):
            limit = int(file.read_text())
            assert SIZE + 256 * MIB < limit < SIZE + 512 * MIB
            members = (file.parent / "cgroup.procs").read_text().split()
            assert str(platform.vm(name)["status"]["pid"]) in members
    assert groups(platform, NAMES[0]), "there is one, where memory can be limited"
