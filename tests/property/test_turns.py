"""Taking turns on cores: one owner for each, no thread behind by more than about a turn, as few moves as that allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.scheduler.shares.fill import fill
from corral.scheduler.shares.turns import KEEP_S, Turn, misdivided, turns, turns_within

TICK = 0.02


@st.composite
def contests(draw: st.DrawFn) -> tuple[list[float], int]:
    """Entitlements of hungry threads by weight, that add up to the cores there are; at most a whole core each."""
    cores = draw(st.integers(1, 4))
    weights = np.array(draw(st.lists(st.floats(0.2, 1.0), min_size=cores + 1, max_size=3 * cores)))
    none = np.zeros(len(weights))
    return fill(float(cores), weights, none, none + np.inf, none + 1.0).entitlement.tolist(), cores


@settings(max_examples=100, deadline=None)
@given(contests())
def test_nobody_is_behind_by_more_than_a_few_turns(contest: tuple[list[float], int]) -> None:
    entitled, cores = contest
    turn = Turn([n % cores for n in range(len(entitled))], [n < cores for n in range(len(entitled))])
    deficit = [0.0] * len(entitled)
    for _ in range(400):
        turn = turns(entitled, deficit, turn, cores, TICK)
        owners = [core for core, owns in zip(turn.core, turn.owns, strict=True) if owns]
        assert sorted(owners) == list(range(cores)), "each core has one owner"
        for n, owns in enumerate(turn.owns):
            deficit[n] += entitled[n] * TICK - (TICK if owns else 0.0)
        assert max(map(abs, deficit)) < 3 * TICK + KEEP_S


def test_three_equal_threads_on_two_cores_change_cores_at_most_once_a_turn() -> None:
    entitled, deficit, moves = [2 / 3] * 3, [0.0] * 3, 0
    turn = Turn([0, 1, 0], [True, True, False])
    for _ in range(300):
        before, turn = turn, turns(entitled, deficit, turn, 2, TICK)
        moves += sum(a != b for a, b in zip(before.core, turn.core, strict=True))
        deficit = [d + 2 / 3 * TICK - (TICK if owns else 0.0) for d, owns in zip(deficit, turn.owns, strict=True)]
    assert moves <= 300


def test_a_turn_goes_on_where_nobody_is_owed_more() -> None:
    turn = Turn([0, 1, 1], [True, True, False])
    assert turns([1.0, 0.5, 0.5], [0.0, 0.0005, 0.0], turn, 2, TICK) == turn


def test_who_is_owed_most_takes_the_core_it_waits_on_without_a_move() -> None:
    turn = turns([2 / 3] * 3, [-0.02, -0.001, 0.021], Turn([0, 1, 0], [True, True, False]), 2, TICK)
    assert turn.owns == [False, True, True]
    assert turn.core[1:] == [1, 0]


def test_turns_within_leave_everybody_where_they_are() -> None:
    turn = turns_within([0.2, 0.4, 0.6, 0.8], [0.03, 0.0, -0.001, -0.03], Turn([0, 1, 1, 0], [True] * 4), TICK)
    assert turn == Turn([0, 1, 1, 0], [True, False, True, False])


def test_what_a_whole_core_lacks_is_no_fault_of_its_division() -> None:
    entitled, core = [0.2, 0.4, 0.6, 0.8], [0, 1, 1, 0]
    assert misdivided(entitled, [0.02, 0.0, 0.0, 0.08], core) == pytest.approx(0.0)
    assert misdivided(entitled, [0.03, 0.0, 0.0, 0.07], core) == pytest.approx(0.01)
