"""Two hundred stories with faults of every kind: the invariants hold, and each story is told twice the same."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from corral.sim.scenario import run

FIRST, LAST = 1, 200


def play(hash_seed: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "corral.sim", "run", "--seeds", f"{FIRST}..{LAST}"]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(400)
def test_the_invariants_hold_and_every_seed_repeats_exactly() -> None:
    players = [play("1"), play("4711")]
    told = [player.communicate() for player in players]
    first, second = (out.splitlines() for out, _ in told)
    assert len(first) == LAST - FIRST + 1, told[0][1][-2000:]
    broken = [line for line in first if not line.endswith(" ok")]
    assert not broken, "python -m corral.sim replay --seed N tells the story of:\n" + "\n".join(broken)
    assert [player.returncode for player in players] == [0, 0]
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert not differing, "these seeds do not repeat under another PYTHONHASHSEED"


def test_the_stories_are_worth_telling() -> None:
    """Faults and requests really happen, and differ from seed to seed."""
    outcomes = [run(seed) for seed in range(1, 11)]
    assert len({outcome.digest for outcome in outcomes}) == 10
    assert sum(outcome.faults for outcome in outcomes) > 50
    whole = "".join(outcome.story for outcome in outcomes)
    for needed in (
        "agent dies at", "agent is killed", "control is killed", "reply to", "is lost", ": hang", ": panic", ": crash",
        "task launch", "task stop", "task delete", "task restart", ": done", ": cancelled", "asked again", "refused, ",
    ):  # fmt: skip
        assert needed in whole, f"in ten seeds nothing like {needed!r} happened"
