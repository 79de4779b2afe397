"""The governor as a process of its own: as a plain user, and replaced by another one."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from corral.agent.grants.process import GovernorProcess
from corral.governor.meter import nodes, physical
from corral.governor.protocol import Plan, Report, VmPlan, VmReport
from corral.runtime import Runtime

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") if os.geteuid() == 0 else ()
BUSY = "while True: pass"


@contextmanager
def plain(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a user without privileges."""
    with subprocess.Popen([*AS_NOBODY, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def may_run() -> bool:
    """The interpreter's directory can be entered by everybody."""
    if AS_NOBODY and shutil.which(AS_NOBODY[0]) is None:
        return False
    with plain(sys.executable, "-c", "import corral") as process:
        return process.wait() == 0


def vm(process: subprocess.Popen[bytes], **more: float) -> VmPlan:
    return VmPlan(id=str(process.pid), project="p", pid=process.pid, threads=(process.pid,), **more)  # type: ignore[arg-type]


def test_without_root_weights_become_nice_values_and_what_is_missing_is_said(tmp_path: Path) -> None:
    if not may_run():
        pytest.skip("another user cannot run this interpreter")
    command = (sys.executable, "-m", "corral.governor", "--state", str(tmp_path))
    with plain(sys.executable, "-c", BUSY) as light, plain(sys.executable, "-c", BUSY) as heavy:
        cpu = min(os.sched_getaffinity(0))
        for process in (light, heavy):
            os.sched_setaffinity(process.pid, {cpu})
        with plain(*command) as governor:
            assert governor.stdin is not None
            assert governor.stdout is not None
            plan = Plan(vms=(vm(light, weight=100, limit=0.5), vm(heavy, weight=1000)))
            governor.stdin.write(msgspec.json.encode(plan) + b"\n")
            governor.stdin.flush()
            reports = [msgspec.json.decode(governor.stdout.readline(), type=Report) for _ in range(3)]
            assert "no control groups: they need root" in reports[0].mode
            assert "limits (caps) cannot be enforced" in reports[0].mode
            assert "without priority" in reports[0].mode
            assert {row.id for row in reports[-1].vms} == {str(light.pid), str(heavy.pid)}
            assert os.getpriority(os.PRIO_PROCESS, heavy.pid) == 0
            assert os.getpriority(os.PRIO_PROCESS, light.pid) > 0
            governor.stdin.close()
            assert governor.wait(10) == 0


def test_a_governor_that_is_replaced_leaves_what_vms_had_saved_to_the_next(tmp_path: Path) -> None:
    one = VmPlan(id="a", project="p", pid=1, threads=(1,), limit=0.5, burst=10.0)
    process = GovernorProcess(tmp_path, Runtime())
    process.follow(Plan(vms=(one,)))
    row = VmReport(id="a", entitled=0.5, granted=0.5, used=0.1, demand=0.1, wait=0.0, credit=0.0, saved=7.5)
    process._report = 0.0, Report(at=0.0, period_s=1.0, cores=2, idle=1.0, foreign=0.0, cost=0.0, mode="", vms=(row,))
    assert process._with_savings().vms[0].saved == 7.5


async def test_the_governor_stays_a_while_for_the_next_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.agent.grants.process.LINGER_S", 1.0)
    process = GovernorProcess(tmp_path, Runtime())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as guest:
        running = asyncio.create_task(process.run())
        process.follow(Plan(vms=(vm(guest),)))
        await until(lambda: process.report() is not None)
        assert process._process is not None
        first = process._process
        process.follow(Plan())
        await asyncio.sleep(0.3)
        process.follow(Plan(vms=(vm(guest),)))
        await asyncio.sleep(1.2)
        assert process._process is first
        assert first.returncode is None
        process.follow(Plan())
        await until(lambda: first.returncode == 0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        guest.kill()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.05)


def test_the_physical_core_and_the_node_of_each_cpu_are_read(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3", "4-5")):
        where = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        where.mkdir(parents=True)
        (where / "thread_siblings_list").write_text(siblings + "\n")
        (tmp_path / "node" / f"node{cpu % 2}" / f"cpu{cpu}").mkdir(parents=True)
    assert physical([0, 1, 2, 3, 4, 7], tmp_path / "cpu") == [0, 1, 0, 1, 4, 7]
    assert nodes([0, 1, 2, 7], tmp_path / "node") == [0, 1, 0, 0]
