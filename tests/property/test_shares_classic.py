"""The classic, unweighted forms of sharing are special cases of ours, exact in rationals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corral.scheduler.ramp import ramp
from corral.scheduler.shares.dominant import dominant
from corral.scheduler.shares.fill import fill
from corral.scheduler.suspicion import Suspicion

amounts = st.fractions(min_value=0, max_value=8, max_denominator=24)
capacities = st.fractions(min_value=Fraction(1, 8), max_value=16, max_denominator=24)


@given(st.integers(1, 10), st.integers(1, 40))
def test_each_of_n_accrues_one_nth_of_each_tick(count: int, ticks: int) -> None:
    """T_i(t) = T_i(t-1) + 1/N."""
    ones, zeros = np.array([Fraction(1)] * count, dtype=object), np.array([Fraction(0)] * count, dtype=object)
    time = zeros
    for _ in range(ticks):
        time = time + fill(Fraction(1), ones, zeros, ones, ones).entitlement
    assert list(time) == [Fraction(ticks, count)] * count


@given(capacities, st.lists(amounts, min_size=1, max_size=6), st.integers(2, 40))
def test_progressive_filling_by_small_steps_ends_at_the_water_level(
    capacity: Fraction, wanted: list[Fraction], steps: int
) -> None:
    """R_i(t) = R_i(t-1) + 1/M, until what is needed is exhausted: off by no more than a step of everybody."""
    step = max(capacity, *wanted) / steps
    filled, left, grown = [Fraction(0)] * len(wanted), capacity, True
    while grown:
        growth = [min(step, want - have) for want, have in zip(wanted, filled, strict=True)]
        grown = 0 < sum(growth) <= left
        if grown:
            filled, left = [have + more for have, more in zip(filled, growth, strict=True)], left - sum(growth)
    want = np.array(wanted, dtype=object)
    ones = np.array([Fraction(1)] * len(wanted), dtype=object)
    exact = fill(capacity, ones, 0 * ones, want, want).entitlement
    assert all(abs(a - b) <= step * len(wanted) for a, b in zip(filled, exact, strict=True))


@given(amounts, amounts, st.integers(1, 12))
def test_a_grant_grows_by_one_kth_and_is_cut_at_once(start: Fraction, target: Fraction, steps: int) -> None:
    """C_i(t) = C_i(t-1) + 1/K: whatever the way, it is there after K steps."""
    whole = Fraction(8)
    grant, seen = start, []
    for _ in range(steps):
        grant = ramp(grant, target, whole, steps)
        seen.append(grant)
    assert grant == target
    assert all(b - a <= whole / steps for a, b in zip([start, *seen], seen, strict=False))
    if target < start:
        assert seen[0] == target


@given(st.integers(1, 20), st.lists(st.booleans(), max_size=40))
def test_suspicion_grows_by_one_lth_and_a_heartbeat_ends_it(limit: int, beats: list[bool]) -> None:
    """F(t) = F(t-1) + 1/L."""
    one, expected = Suspicion(limit=limit), Fraction(0)
    for answered in beats:
        one = one.beat(answered)
        expected = Fraction(0) if answered else min(Fraction(1), expected + Fraction(1, limit))
        assert one.level == float(expected)
        assert one.hung == (expected == 1)


@st.composite
def needs(draw: st.DrawFn) -> tuple[list[Fraction], list[Fraction], list[list[Fraction]]]:
    resources = draw(st.integers(1, 3))
    row = st.lists(amounts, min_size=resources, max_size=resources)
    wanted = draw(st.lists(row, min_size=1, max_size=6))
    some = st.fractions(min_value=Fraction(1, 24), max_value=10, max_denominator=24)
    weight = draw(st.lists(some, min_size=len(wanted), max_size=len(wanted)))
    return draw(st.lists(capacities, min_size=resources, max_size=resources)), weight, wanted


def shared(
    asked: tuple[list[Fraction], list[Fraction], list[list[Fraction]]],
) -> tuple[list[list[Fraction]], list[Fraction]]:
    """What each gets, and dominant shares over weight."""
    capacity, weight, wanted = (np.array(part, dtype=object) for part in asked)
    got = dominant(capacity, weight, wanted)
    return got.tolist(), list((got / capacity).max(axis=1) / weight)


@given(needs())
def test_dominant_shares_never_use_more_than_there_is_and_waste_nothing(
    asked: tuple[list[Fraction], list[Fraction], list[list[Fraction]]],
) -> None:
    capacity, _, wanted = asked
    got, _ = shared(asked)
    used = [sum(row[r] for row in got) for r in range(len(capacity))]
    assert all(use <= most for use, most in zip(used, capacity, strict=True))
    for want, have in zip(wanted, got, strict=True):
        assert all(0 <= a <= b for a, b in zip(have, want, strict=True))
        if have != want:  # something that it needs is used up
            assert any(want[r] > 0 and used[r] == capacity[r] for r in range(len(capacity)))


@given(needs())
def test_who_has_not_enough_has_no_smaller_dominant_share_than_whoever_shares_its_shortage(
    asked: tuple[list[Fraction], list[Fraction], list[list[Fraction]]],
) -> None:
    capacity, _, wanted = asked
    got, share = shared(asked)
    used = [sum(row[r] for row in got) for r in range(len(capacity))]
    for i, want in enumerate(wanted):
        short = [r for r in range(len(capacity)) if want[r] > 0 and used[r] == capacity[r]]
        if got[i] != want and short:
            assert any(share[i] >= max(share[j] for j in range(len(wanted)) if wanted[j][r] > 0) for r in short)


@given(needs())
def test_sharing_is_never_worse_than_a_part_of_ones_own(
    asked: tuple[list[Fraction], list[Fraction], list[list[Fraction]]],
) -> None:
    """Everybody has at least the dominant share that its weight's part of each resource would give it."""
    capacity, weight, wanted = asked
    _, share = shared(asked)
    for i, want in enumerate(wanted):
        enough = max((a / b for a, b in zip(want, capacity, strict=True)), default=Fraction(0))
        assert share[i] * weight[i] >= min(enough, weight[i] / sum(weight))


@given(capacities, st.lists(st.tuples(amounts, capacities), min_size=1, max_size=6))
def test_with_one_resource_dominant_shares_are_water_filling(
    capacity: Fraction, rows: list[tuple[Fraction, Fraction]]
) -> None:
    want = np.array([row[0] for row in rows], dtype=object)
    weight = np.array([row[1] for row in rows], dtype=object)
    got = dominant(np.array([capacity], dtype=object), weight, want[:, None])
    assert list(got[:, 0]) == list(fill(capacity, weight, 0 * want, want, want).entitlement)


def test_the_example_of_the_paper() -> None:
    """9 CPUs and 18 GB; tasks of (1, 4) and (3, 1): three tasks for the one and two for the other."""
    capacity = np.array([Fraction(9), Fraction(18)], dtype=object)
    wanted = np.array([[Fraction(9), Fraction(36)], [Fraction(27), Fraction(9)]], dtype=object)
    got = dominant(capacity, np.array([Fraction(1), Fraction(1)], dtype=object), wanted)
    assert got.tolist() == [[3, 12], [6, 2]]
