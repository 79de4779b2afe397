"""Forks made ahead, with real guests: a launch gets one that waits, and is as much itself as any other fork."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.platform import Platform, wait_until
from tests.integration.test_templates import who

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def warm() -> Iterator[Platform]:
    """A platform with a template of micro guests of 96 MiB, of which one fork waits after each launch."""
    with Platform(env={"CORRAL_WARM": "on"}) as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        one.run("template", "create", "micro", "--name", "warm", "--memory", "96M", timeout=200)
        launch(one, "first")
        yield one


def launch(platform: Platform, name: str) -> dict[str, Any]:
    platform.run("launch", "micro", "--name", name, "--memory", "96M")
    vm: dict[str, Any] = platform.vm(name)
    return vm


def waits(platform: Platform, count: int = 1) -> None:
    def so() -> bool:
        return bool(platform.json("template", "show", "warm")["status"]["warm"] == count)

    wait_until(so, 30, f"{count} to wait")


def was_warm(vm: dict[str, Any]) -> bool:
    return bool(vm["status"]["details"]["start"]["warm"])


def test_a_launch_gets_the_one_that_waits_and_is_itself(warm: Platform) -> None:
    waits(warm)
    waiting = set(warm.qemus()) - {vm["status"]["pid"] for vm in warm.json("list")}
    assert len(waiting) == 1
    warm.run("launch", "micro", "--name", "own", "--memory", "96M", "--publish", "0:8080")
    vm = warm.vm("own")
    assert was_warm(vm)
    assert vm["status"]["pid"] in waiting
    assert [port["guest"] for port in vm["status"]["ports"]] == [8080, 22]
    machine_id, hostname, key, mac, _, address = who(warm, "own")
    assert machine_id == vm["meta"]["id"].replace("-", "")
    assert (hostname, mac, address) == ("own", vm["spec"]["nics"][0]["mac"], "10.0.2.15/24")
    other = who(warm, "first")
    assert {key, mac, machine_id}.isdisjoint(other)
    warm.run("exec", "own", "--", "sh", "-c", "echo published > /tmp/index.html; (httpd -p 8080 -h /tmp &)")
    port = next(port["host"] for port in vm["status"]["ports"] if port["guest"] == 8080)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
        assert answer.read() == b"published\n"
    warm.run("restart", "own")
    assert warm.text("exec", "own", "--", "hostname") == "own\n"
    warm.run("delete", "own", "--force")


def test_one_that_died_costs_a_launch_nothing_but_time(warm: Platform) -> None:
    waits(warm)
    vms = {vm["status"]["pid"] for vm in warm.json("list")}
    for pid in set(warm.qemus()) - vms:
        os.kill(pid, signal.SIGKILL)
    vm = launch(warm, "later")
    assert (vm["status"]["template"], was_warm(vm)) == ("warm", False)
    assert who(warm, "later")[1] == "later"
    warm.run("delete", "later", "--force")


@pytest.mark.parametrize("point", ["api.after-commit", "engine.take.given", "engine.take.recorded"])
def test_killed_while_it_is_given_the_vm_comes_up_as_itself(warm: Platform, point: str) -> None:
    warm.run("down")
    assert len(warm.qemus()) == 1  # the VM that runs
    warm.up(CORRAL_KILL_AT=point)
    waits(warm)
    warm.killed_at(point, "launch", "micro", "--name", "victim", "--memory", "96M", "--no-wait")
    warm.up()
    warm.run("vm", "wait", "victim", "--for", "running", "--timeout", "60s")
    vm = warm.vm("victim")
    assert (vm["status"]["template"], who(warm, "victim")[1]) == ("warm", "victim")
    waits(warm)
    assert len(warm.qemus()) == 3
    warm.run("delete", "victim", "--force")


def test_a_template_and_a_daemon_that_go_leave_none_waiting(warm: Platform) -> None:
    waits(warm)
    warm.run("delete", "first", "--force")
    warm.run("template", "delete", "warm")
    wait_until(lambda: warm.qemus() == [], 30, "the one that waits to end")
    wait_until(lambda: list((warm.state / "vms").glob("*")) == [], 30, "its files to go")
    warm.assert_nothing_left()
