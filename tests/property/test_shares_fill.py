"""Water-filling, exact in rationals: the properties that make it a fair division, and its classic form."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corral.scheduler.shares.fill import fill

amounts = st.fractions(min_value=0, max_value=8, max_denominator=24)
weights = st.fractions(min_value=Fraction(1, 24), max_value=100, max_denominator=24)
vms = st.lists(st.tuples(weights, amounts, amounts, amounts), min_size=1, max_size=8)
capacities = st.fractions(min_value=Fraction(1, 8), max_value=16, max_denominator=24)


def exact(capacity: Fraction, rows: list[tuple[Fraction, ...]]) -> tuple[list[Fraction], Any]:
    columns = [np.array(column, dtype=object) for column in zip(*rows, strict=True)]
    filled = fill(capacity, *columns)
    return list(filled.entitlement), filled.level


def wants(row: tuple[Fraction, ...]) -> Fraction:
    return min(row[2], row[3])


@given(capacities, vms)
def test_all_that_can_be_used_is_given_and_never_more(capacity: Fraction, rows: list[tuple[Fraction, ...]]) -> None:
    entitled, _ = exact(capacity, rows)
    assert sum(entitled) == min(capacity, sum(wants(row) for row in rows))


@given(capacities, vms)
def test_nobody_gets_more_than_they_want_or_less_than_their_reservation(
    capacity: Fraction, rows: list[tuple[Fraction, ...]]
) -> None:
    entitled, _ = exact(capacity, rows)
    floors = [min(row[1], wants(row)) for row in rows]
    feasible = sum(floors) <= capacity
    for row, floor, e in zip(rows, floors, entitled, strict=True):
        assert 0 <= e <= wants(row)
        assert e >= floor or not feasible


@given(capacities, vms)
def test_who_is_not_clamped_gets_by_weight(capacity: Fraction, rows: list[tuple[Fraction, ...]]) -> None:
    entitled, _ = exact(capacity, rows)
    free = [
        e / row[0] for row, e in zip(rows, entitled, strict=True) if min(row[1], wants(row)) < e < wants(row)
    ]  # fmt: skip
    assert len(set(free)) <= 1


@given(capacities, vms, st.data())
def test_more_weight_never_means_less(
    capacity: Fraction, rows: list[tuple[Fraction, ...]], data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(rows) - 1))
    more = data.draw(weights)
    before, _ = exact(capacity, rows)
    heavier = [*rows]
    heavier[number] = (rows[number][0] + more, *rows[number][1:])
    after, _ = exact(capacity, heavier)
    assert after[number] >= before[number]


@given(capacities, vms, st.randoms(use_true_random=False))
def test_order_does_not_matter(capacity: Fraction, rows: list[tuple[Fraction, ...]], random: Any) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)
    before, _ = exact(capacity, rows)
    after, _ = exact(capacity, [rows[i] for i in order])
    assert after == [before[i] for i in order]


@given(capacities, st.integers(1, 12))
def test_the_classic_form_is_one_nth_each(capacity: Fraction, count: int) -> None:
    entitled, _ = exact(capacity, [(Fraction(1), Fraction(0), capacity, capacity)] * count)
    assert entitled == [capacity / count] * count


@given(capacities, vms)
def test_floating_point_agrees_with_the_exact_result(capacity: Fraction, rows: list[tuple[Fraction, ...]]) -> None:
    entitled, _ = exact(capacity, rows)
    columns = [np.array(column, dtype=float) for column in zip(*rows, strict=True)]
    found = fill(float(capacity), *columns).entitlement
    assert np.allclose(found, np.array(entitled, dtype=float), atol=1e-6)
