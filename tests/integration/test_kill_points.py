"""SIGKILL of the daemon at every named step of create, start, stop and delete, with real guests.

After the restart each VM reaches what was asked for, and when it is deleted nothing is left. A point that is never
reached fails its test, so the list in runtime/points.py cannot rot.
"""

from __future__ import annotations

import os

import pytest

from corral.agent.settings import Settings
from corral.runtime.points import ALL_POINTS
from tests.integration.platform import Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

LAUNCH = [p for p in ALL_POINTS if p.startswith(("create.", "start.", "place.", "engine.spawn.", "api."))]
STOP = [p for p in ALL_POINTS if p.startswith("stop.")]
DELETE = [p for p in ALL_POINTS if p.startswith("delete.")]


@pytest.fixture(scope="module")
def installed() -> Platform:  # type: ignore[misc]
    with Platform(settings=Settings(backoff_s=1.0)) as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        one.run("template", "create", "micro", "--memory", "97M", timeout=200)
        one.run("down")
        yield one  # type: ignore[misc]


def dies_at(platform: Platform, point: str, *command: str) -> None:
    """Start a daemon that kills itself at ``point``, give the command, and see it die."""
    platform.run("down", check=False)
    platform.up(CORRAL_KILL_AT=point)
    platform.killed_at(point, *command)
    platform.up()


def running(platform: Platform) -> None:
    """A daemon and a VM that runs: forked, which takes a tenth of a boot."""
    platform.up()
    platform.run("launch", "micro", "--name", "victim", "--memory", "97M")
    assert platform.vm("victim")["status"]["template"]


def end(platform: Platform) -> None:
    platform.run("delete", "victim", "--force", check=False)
    wait_until(lambda: platform.json("list") == [], 30, "the VM to be deleted")
    platform.assert_nothing_left()


@pytest.mark.parametrize("point", LAUNCH)
def test_killed_during_launch_the_vm_still_runs(installed: Platform, point: str) -> None:
    dies_at(installed, point, "launch", "micro", "--name", "victim", "--memory", "96M", "--no-wait")
    if point == "api.before-commit":
        assert installed.json("list") == []  # never acknowledged, never half there
        installed.run("launch", "micro", "--name", "victim", "--memory", "96M", "--no-wait")
    installed.run("vm", "wait", "victim", "--for", "running", "--timeout", "60s")
    assert len(installed.qemus()) == 1
    assert installed.text("exec", "victim", "--", "echo", "alive") == "alive\n"
    end(installed)


@pytest.mark.parametrize("point", STOP)
def test_killed_during_stop_the_vm_still_stops(installed: Platform, point: str) -> None:
    running(installed)
    force = ["--force"] if point == "stop.killed" else []
    dies_at(installed, point, "stop", "victim", "--no-wait", *force)
    installed.run("vm", "wait", "victim", "--for", "stopped", "--timeout", "60s")
    assert installed.qemus() == []
    end(installed)


@pytest.mark.parametrize("point", DELETE)
def test_killed_during_delete_nothing_is_left(installed: Platform, point: str) -> None:
    running(installed)
    dies_at(installed, point, "delete", "victim", "--force", "--no-wait")
    wait_until(lambda: installed.json("list") == [], 30, "the VM to be deleted")
    installed.assert_nothing_left()


def test_a_running_guest_does_not_notice_the_death_of_the_daemon(installed: Platform) -> None:
    installed.up()
    installed.run("launch", "micro", "--name", "victim", "--memory", "96M")
    before = installed.text("exec", "victim", "--", "cat", "/proc/sys/kernel/random/boot_id")
    qemu = installed.vm("victim")["status"]["pid"]
    installed.kill()
    os.kill(qemu, 0)
    installed.up()
    installed.run("vm", "wait", "victim", "--for", "running", "--timeout", "20s")
    assert installed.text("exec", "victim", "--", "cat", "/proc/sys/kernel/random/boot_id") == before
    assert installed.vm("victim")["status"]["pid"] == qemu
    end(installed)
