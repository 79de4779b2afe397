"""The idle-memory tax, exact in rationals, and the plan that follows it step by step."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from corral.scheduler.memory import (
    HIGH,
    STEP_LEAST,
    STEPS,
    STILL,
    Claim,
    Pool,
    entitled,
    least,
    margin,
    missing,
    most,
    plan,
)
from corral.units import GIB, MIB

TAX = Fraction(3, 4)


@st.composite
def a_claim(draw: st.DrawFn) -> Claim:
    """Sizes in MiB; the guest uses no more than it has, and has no more than its hardware."""
    hardware = draw(st.integers(64, 4096))
    size = draw(st.one_of(st.just(hardware), st.integers(64, hardware)))
    granted = draw(st.integers(32, hardware))
    used = draw(st.one_of(st.none(), st.integers(16, granted)))
    reserve = draw(st.integers(0, size))
    scaled = [value * MIB for value in (size, granted)]
    return Claim(*scaled, None if used is None else used * MIB, reserve * MIB, draw(st.integers(1, 1000)))


claims_of = st.lists(a_claim(), min_size=1, max_size=8)
totals = st.integers(0, 16 * 1024).map(lambda mib: mib * MIB)


@given(totals, claims_of)
def test_all_is_divided_between_what_each_must_keep_and_may_have(total: int, claims: list[Claim]) -> None:
    parts = entitled(Fraction(total), claims, TAX)
    floors, ceilings = sum(least(c) for c in claims), sum(most(c) for c in claims)
    assert sum(parts) == min(max(total, floors), ceilings)
    assert all(least(c) <= part <= most(c) for c, part in zip(claims, parts, strict=True))


@given(totals, claims_of)
def test_the_price_of_a_byte_is_the_same_for_all_who_are_not_at_a_bound(total: int, claims: list[Claim]) -> None:
    """Who is at a floor could pay less and has to keep its memory; who is at a ceiling would pay more for more."""
    parts = entitled(Fraction(total), claims, TAX)

    def price(claim: Claim, part: Any) -> Fraction:
        used = claim.granted if claim.used is None else claim.used
        return Fraction(claim.weight) / (used + (part - used) / (1 - TAX))

    inside = {
        price(c, p) for c, p in zip(claims, parts, strict=True) if least(c) < p < most(c)
    }  # fmt: skip
    assert len(inside) <= 1
    for c, p in zip(claims, parts, strict=True):
        for level in inside:
            assert price(c, p) <= level or p > least(c) or p == most(c)
            assert price(c, p) >= level or p < most(c) or p == least(c)


@given(totals, claims_of, st.integers(1, 1000), st.randoms(use_true_random=False))
def test_more_weight_never_means_less_and_order_does_not_matter(
    total: int, claims: list[Claim], more: int, random: Any
) -> None:
    parts = entitled(Fraction(total), claims, TAX)
    heavier = [claims[0]._replace(weight=claims[0].weight + more), *claims[1:]]
    assert entitled(Fraction(total), heavier, TAX)[0] >= parts[0]
    order = list(range(len(claims)))
    random.shuffle(order)
    assert entitled(Fraction(total), [claims[i] for i in order], TAX) == [parts[i] for i in order]


@given(st.integers(256, 4096), st.integers(1, 200), st.integers(1, 40))
def test_of_two_alike_the_idle_one_pays(size: int, used: int, percent: int) -> None:
    idle = Claim(size * MIB, size * MIB, used * size * MIB // 512)
    busy = idle._replace(used=idle.used + (idle.size - idle.used) // 2 if idle.used else idle.size // 2)
    left = 2 * idle.size - 2 * idle.size * percent // 100
    lazy, eager = entitled(left, [idle, busy])
    assert lazy <= eager


@given(claims_of, totals, st.integers(0, 4096))
def test_a_step_is_bounded_and_never_takes_what_must_be_kept(claims: list[Claim], budget: int, held: int) -> None:
    for claim, target in zip(claims, plan(Pool(budget, held * MIB), claims), strict=True):
        pace = max(STEP_LEAST, max(claim.size, claim.granted) // STEPS)
        assert abs(target - claim.granted) <= pace
        assert target >= min(claim.granted, least(claim)) - 1  # rounded down to whole bytes
        assert target <= max(claim.granted, most(claim))
        if claim.used is not None:
            assert target >= min(claim.granted, claim.used + margin(claim.size)) - 1
            assert target >= min(claim.granted, claim.reserve) - 1


@given(claims_of, st.integers(0, 15))
def test_without_pressure_nobody_gives_anything(claims: list[Claim], sixteenths: int) -> None:
    whole = [c._replace(granted=c.size, used=None if c.used is None else min(c.used, c.size)) for c in claims]
    pool = Pool(64 * GIB, sixteenths * 4 * GIB)
    assert plan(pool, whole) == [claim.size for claim in whole]
    assert missing(pool, whole) == 0


class Guests:
    """What guests do with their grants: they use what they use, and touch what they once had until it is taken."""

    OVERHEAD = 48 * MIB

    def __init__(self, sizes: list[int], used: list[int]) -> None:
        self.sizes, self.used = sizes, used
        self.granted = list(sizes)
        self.touched = list(used)
        self.before = 0

    def pool(self, budget: int) -> Pool:
        self.touched = [
            min(g, max(t, u)) for g, t, u in zip(self.granted, self.touched, self.used, strict=True)
        ]  # fmt: skip
        overhead = self.OVERHEAD * len(self.sizes)
        held = sum(self.touched) + overhead
        growth, self.before = max(0, held - (self.before or held)), held
        return Pool(budget, held, overhead, growth)

    def turn(self, budget: int) -> Pool:
        claims = [Claim(*row) for row in zip(self.sizes, self.granted, self.used, strict=True)]
        pool = self.pool(budget)
        self.granted = plan(pool, claims)
        return pool

    def eat(self, number: int, more: int) -> None:
        """A guest uses more and more, as long as it has any."""
        self.used[number] = max(self.used[number], min(self.granted[number], self.used[number] + more))


@given(st.lists(st.integers(0, 100), min_size=2, max_size=8), st.integers(110, 200))
def test_pressure_ends_where_it_can_and_all_is_given_back_when_it_ends(busy: list[int], percent: int) -> None:
    sizes = [GIB] * len(busy)
    budget = sum(size + Guests.OVERHEAD for size in sizes) * 100 // percent
    guests = Guests(sizes, [64 * MIB + size * part // 200 for size, part in zip(sizes, busy, strict=True)])
    guests.touched = list(sizes)  # all of them have used all of it once
    for _ in range(60):
        guests.turn(budget)
    pool, claims = guests.pool(budget), [Claim(*row) for row in zip(sizes, guests.granted, guests.used, strict=True)]
    assert not pool.pressed or missing(pool, claims) > 0
    settled = list(guests.granted)
    guests.turn(budget)
    assert all(abs(a - b) <= STILL for a, b in zip(guests.granted, settled, strict=True)), "it rests"
    guests.used, guests.touched = [64 * MIB] * len(sizes), [64 * MIB] * len(sizes)
    for _ in range(2 * STEPS + 4):
        guests.turn(64 * GIB)
    assert guests.granted == sizes


@given(st.integers(1, 6), st.integers(1, 32))
def test_hungry_guests_are_stopped_at_the_budget_and_then_nothing_swings(hungry: int, mib: int) -> None:
    """Six guests that could have one and a half times the budget; some take all they can get."""
    size = 256 * MIB
    budget = 6 * (size + Guests.OVERHEAD) * 100 // 150
    guests = Guests([size] * 6, [80 * MIB] * 6)
    seen = []
    for _ in range(120):
        for number in range(hungry):
            guests.eat(number, mib * MIB)
        seen.append((guests.turn(budget).held, tuple(guests.granted)))
    # Each of them keeps its margin, and may use it: that much, but never more, is held beyond the mark.
    assert max(held for held, _ in seen) <= budget - budget // HIGH + hungry * (margin(size) + mib * MIB)
    assert all(granted >= used for granted, used in zip(guests.granted, guests.used, strict=True))
    moves = sum(a != b for (_, a), (_, b) in pairwise(seen[60:]))
    assert moves <= 2, "once they have what they can get, nobody's grant moves"
