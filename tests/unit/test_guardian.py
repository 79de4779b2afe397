"""The guardian: what it was told to do, it does when its governor is killed or silent, and not otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from corral.governor.guardian import SILENT_S, Guardian
from tests.integration.platform import wait_until

KILLED = """
import os, signal, sys
from corral.governor.guardian import Guardian
Guardian().tell({sys.argv[1]: "8192", "/nonexistent/group": "1"}, [int(sys.argv[2]), 999999999], [0])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_governor_that_is_killed_leaves_nobody_at_a_weight_that_was_for_a_moment(tmp_path: Path) -> None:
    weight = tmp_path / "weight"
    weight.write_text("8")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bound:
        try:
            last = max(os.sched_getaffinity(0))
            os.sched_setaffinity(bound.pid, {last})
            done = subprocess.run([sys.executable, "-c", KILLED, str(weight), str(bound.pid)], check=False, timeout=30)
            assert done.returncode == -signal.SIGKILL
            wait_until(lambda: weight.read_text() == "8192", 10, "the weight to be put right")
            wait_until(lambda: os.sched_getaffinity(bound.pid) == {0}, 10, "its threads to be let go")
        finally:
            bound.kill()


def test_a_governor_that_is_silent_counts_as_dead_until_it_speaks_again(tmp_path: Path) -> None:
    weight, guardian = tmp_path / "weight", Guardian()
    for _ in range(2):
        weight.write_text("8")
        assert guardian.tell({str(weight): "8192"}, [], [])
        wait_until(lambda: weight.read_text() == "8192", 10, "the weight to be put right")
    guardian.close()


def test_one_that_was_relieved_does_nothing(tmp_path: Path) -> None:
    weight, guardian = tmp_path / "weight", Guardian()
    weight.write_text("8")
    assert guardian.tell({str(weight): "8192"}, [], [])
    guardian.relieve()
    time.sleep(1.5 * SILENT_S)
    guardian.close()
    assert weight.read_text() == "8"


def test_without_its_guardian_a_governor_is_told_so(tmp_path: Path) -> None:
    guardian = Guardian()
    assert guardian.tell({}, [], [])
    assert guardian._process is not None
    guardian._process.kill()
    guardian._process.wait()
    assert not guardian.tell({}, [], [])
    guardian.close()


def test_a_guardian_that_is_stopped_does_not_stop_its_governor() -> None:
    guardian = Guardian()
    assert guardian.tell({}, [0], [])
    assert guardian._process is not None
    os.kill(guardian._process.pid, signal.SIGSTOP)
    told = [guardian.tell({}, [0] * 4000, [number]) for number in range(20)]
    assert not told[-1]
    guardian.close()
    assert guardian._process.returncode == -signal.SIGKILL
