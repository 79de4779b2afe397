"""Thirty guests at once on two cores, of which ten boot and twenty are forked, and one of them frozen."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.platform import Platform, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(420)]


def test_thirty_at_once_and_a_frozen_one_disturbs_nobody(platform: Platform) -> None:
    platform.run("template", "create", "micro", "--memory", "96M", timeout=200)
    small = ("micro", "--memory", "96M", "--timeout", "300s")
    with ThreadPoolExecutor() as pool:
        boots = pool.submit(platform.run, "launch", *small, "--name", "many", "--count", "10", "--cold", timeout=320)
        forks = pool.submit(platform.run, "launch", *small, "--name", "fork", "--count", "20", timeout=320)
        boots.result()
        forks.result()
    vms = platform.json("list")
    assert [vm["status"]["phase"] for vm in vms] == ["running"] * 30
    assert [bool(vm["status"]["template"]) for vm in vms].count(True) == 20
    names = [vm["meta"]["name"] for vm in vms]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda name: platform.text("exec", name, "--", "hostname").strip(), names)) == names

    victim = platform.vm("many-7")["status"]["pid"]
    os.kill(victim, signal.SIGSTOP)
    try:
        wait_until(lambda: platform.phase("many-7") == "unresponsive", 60, "many-7 to be called unresponsive")
        assert platform.vm("many-7")["status"]["reason"]
        started = time.monotonic()
        assert len(platform.json("list")) == 30
        assert platform.text("exec", "many-8", "--", "echo", "fine") == "fine\n"
        assert time.monotonic() - started < 10
        others = [vm["status"]["phase"] for vm in platform.json("list") if vm["meta"]["name"] != "many-7"]
        assert others == ["running"] * 29
        refused = platform.run("exec", "many-7", "--", "true", check=False)
        assert refused.returncode == 125
        assert b"many-7" in refused.stderr
    finally:
        os.kill(victim, signal.SIGCONT)
    wait_until(lambda: platform.phase("many-7") == "running", 60, "many-7 to recover")
    assert platform.text("exec", "many-7", "--", "echo", "back") == "back\n"
