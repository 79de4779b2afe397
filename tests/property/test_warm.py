"""How many forks are made ahead: never more than there is room for, one for each before two for one, none for nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.scheduler.warm import FADE_S, Use, Want, sizes, wanted
from corral.units import MIB

NOW, IDLE_S = 10_000.0, 600.0


@st.composite
def wants(draw: st.DrawFn) -> list[Want]:
    found = []
    for number in range(draw(st.integers(0, 6))):
        ago = draw(st.one_of(st.floats(0, 20), st.floats(0, 2 * IDLE_S)))
        use = Use(draw(st.floats(0, 500)), NOW - ago)
        found.append(Want(str(number), use, draw(st.floats(0.05, 5)), draw(st.integers(1, 200)) * MIB))
    return found


rooms = st.integers(0, 2000).map(lambda mib: mib * MIB)


@given(wants(), rooms, st.integers(1, 10))
def test_they_fit_and_nobody_gets_more_than_is_right(some: list[Want], room: int, most: int) -> None:
    found = sizes(some, NOW, room=room, idle_s=IDLE_S, most=most)
    assert set(found) == {want.id for want in some}
    assert sum(found[want.id] * want.cost for want in some) <= room
    assert sum(found.values()) <= most
    for want in some:
        assert 0 <= found[want.id] <= wanted(want, NOW, idle_s=IDLE_S, most=most)


@given(wants(), rooms, st.integers(1, 10))
def test_one_for_each_comes_before_two_for_one(some: list[Want], room: int, most: int) -> None:
    found = sizes(some, NOW, room=room, idle_s=IDLE_S, most=most)
    without = [want for want in some if not found[want.id] and wanted(want, NOW, idle_s=IDLE_S, most=most)]
    for want in without:  # what the second ones of others took would not have done for it, or none was to be had
        spent = sum(min(1, found[one.id]) * one.cost for one in some)
        assert room - spent < want.cost or sum(min(1, number) for number in found.values()) == most


@given(wants(), rooms)
def test_with_room_for_all_everybody_gets_what_is_right(some: list[Want], room: int) -> None:
    found = sizes(some, NOW, room=1 << 50, idle_s=IDLE_S, most=1000)
    assert found == {want.id: wanted(want, NOW, idle_s=IDLE_S, most=1000) for want in some}


@given(st.floats(0, 2 * IDLE_S), st.floats(0, 100), st.floats(0.05, 5))
def test_used_lately_means_one_and_long_ago_none(ago: float, level: float, making_s: float) -> None:
    number = wanted(Want("a", Use(level, NOW - ago), making_s, MIB), NOW, idle_s=IDLE_S, most=8)
    assert number >= 1 if ago <= IDLE_S else number == 0


@given(st.integers(1, 20), st.floats(0.1, 1.0))
def test_a_steady_rate_is_found_and_answered_with_what_is_asked_for_meanwhile(rate: int, making_s: float) -> None:
    use = Use()
    for number in range(rate * int(10 * FADE_S)):
        use = use.again(number / rate)
    now = use.at
    assert abs(use.rate(now) - rate) <= 0.02 * rate + 1 / FADE_S
    number = wanted(Want("a", use, making_s, MIB), now, idle_s=IDLE_S, most=1000)
    assert number >= rate * making_s
    assert number <= 2.2 * rate * making_s + 2


def test_a_burst_that_is_over_is_forgotten() -> None:
    use = Use()
    for _ in range(100):
        use = use.again(0.0)
    assert wanted(Want("a", use, 1.0, MIB), 0.0, idle_s=IDLE_S, most=100) == 7
    assert wanted(Want("a", use, 1.0, MIB), 4 * FADE_S, idle_s=IDLE_S, most=100) == 1
