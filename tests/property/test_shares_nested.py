"""Projects, then their VMs: the properties of a fair division on both levels, exact in rationals."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corral.scheduler.shares.fill import fill, fill_each
from corral.scheduler.shares.nested import Division, Parties, divide

amounts = st.fractions(min_value=0, max_value=8, max_denominator=24)
weights = st.fractions(min_value=Fraction(1, 24), max_value=100, max_denominator=24)
capacities = st.fractions(min_value=Fraction(1, 8), max_value=16, max_denominator=24)
Row = tuple[Fraction, ...]


class Host(NamedTuple):
    """``projects``: weight, reserve, limit. ``vms``: weight, reserve, limit, demand. ``owner``: project of each VM."""

    projects: list[Row]
    vms: list[Row]
    owner: list[int]


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    projects = draw(st.lists(st.tuples(weights, amounts, amounts), min_size=1, max_size=4))
    vms = draw(st.lists(st.tuples(weights, amounts, amounts, amounts), min_size=1, max_size=8))
    owner = draw(st.lists(st.integers(0, len(projects) - 1), min_size=len(vms), max_size=len(vms)))
    return Host(projects, vms, owner)


def columns(rows: list[Row], dtype: Any) -> list[Any]:
    return [np.array(column, dtype=dtype) for column in zip(*rows, strict=True)]


def divided(capacity: Fraction, host: Host, dtype: Any = object) -> Division:
    *vm, demand = columns(host.vms, dtype)
    to = float if dtype is float else Fraction
    return divide(
        to(capacity), Parties(*columns(host.projects, dtype)), Parties(*vm), demand, np.array(host.owner)
    )  # fmt: skip


def wants(row: Row) -> Fraction:
    return min(row[2], row[3])


def wanted(host: Host, project: int) -> Fraction:
    """What a project can use."""
    mine = [wants(vm) for vm, owner in zip(host.vms, host.owner, strict=True) if owner == project]
    return min(host.projects[project][2], sum(mine, Fraction(0)))


def floor(host: Host, project: int) -> Fraction:
    """What a project must have at least."""
    mine = [min(vm[1], wants(vm)) for vm, owner in zip(host.vms, host.owner, strict=True) if owner == project]
    return min(wanted(host, project), max(host.projects[project][1], sum(mine, Fraction(0))))


@given(capacities, hosts())
def test_all_that_can_be_used_is_given_on_both_levels(capacity: Fraction, host: Host) -> None:
    found = divided(capacity, host)
    assert sum(found.share) == min(capacity, sum(wanted(host, p) for p in range(len(host.projects))))
    for project, share in enumerate(found.share):
        mine = [e for e, owner in zip(found.entitlement, host.owner, strict=True) if owner == project]
        assert sum(mine) == share <= host.projects[project][2]


@given(capacities, hosts())
def test_a_vms_reservation_holds_however_light_its_project_is(capacity: Fraction, host: Host) -> None:
    found = divided(capacity, host)
    feasible = sum(floor(host, p) for p in range(len(host.projects))) <= capacity
    for vm, owner, e in zip(host.vms, host.owner, found.entitlement, strict=True):
        assert 0 <= e <= wants(vm)
        reserved = [min(v[1], wants(v)) for v, o in zip(host.vms, host.owner, strict=True) if o == owner]
        if feasible and sum(reserved) <= host.projects[owner][2]:
            assert e >= min(vm[1], wants(vm))


@given(capacities, hosts())
def test_who_is_not_clamped_gets_by_weight_within_its_project_and_projects_among_each_other(
    capacity: Fraction, host: Host
) -> None:
    found = divided(capacity, host)
    for project in range(len(host.projects)):
        free = {
            e / vm[0] for vm, owner, e in zip(host.vms, host.owner, found.entitlement, strict=True)
            if owner == project and min(vm[1], wants(vm)) < e < wants(vm)
        }  # fmt: skip
        assert len(free) <= 1
    free = {
        share / host.projects[p][0] for p, share in enumerate(found.share) if floor(host, p) < share < wanted(host, p)
    }  # fmt: skip
    assert len(free) <= 1


@given(capacities, hosts(), st.data())
def test_more_weight_never_means_less(capacity: Fraction, host: Host, data: st.DataObject) -> None:
    number, more = data.draw(st.integers(0, len(host.vms) - 1)), data.draw(weights)
    before = divided(capacity, host)
    vms = [*host.vms]
    vms[number] = (vms[number][0] + more, *vms[number][1:])
    assert divided(capacity, host._replace(vms=vms)).entitlement[number] >= before.entitlement[number]
    owner = host.owner[number]
    projects = [*host.projects]
    projects[owner] = (projects[owner][0] + more, *projects[owner][1:])
    assert divided(capacity, host._replace(projects=projects)).share[owner] >= before.share[owner]


@given(capacities, hosts(), st.randoms(use_true_random=False))
def test_order_does_not_matter(capacity: Fraction, host: Host, random: Any) -> None:
    vms, projects = list(range(len(host.vms))), list(range(len(host.projects)))
    random.shuffle(vms)
    random.shuffle(projects)
    mixed = Host(
        [host.projects[p] for p in projects], [host.vms[v] for v in vms], [projects.index(host.owner[v]) for v in vms]
    )
    before, after = divided(capacity, host), divided(capacity, mixed)
    assert list(after.entitlement) == [before.entitlement[v] for v in vms]
    assert list(after.share) == [before.share[p] for p in projects]


@given(capacities, st.integers(1, 5), st.integers(1, 5))
def test_the_classic_form_is_one_nth_of_one_mth(capacity: Fraction, projects: int, vms: int) -> None:
    one, none = Fraction(1), Fraction(0)
    host = Host(
        [(one, none, capacity)] * projects, [(one, none, capacity, capacity)] * (projects * vms),
        [p for p in range(projects) for _ in range(vms)],
    )  # fmt: skip
    assert list(divided(capacity, host).entitlement) == [capacity / projects / vms] * (projects * vms)


@given(capacities, hosts())
def test_floating_point_agrees_with_the_exact_result(capacity: Fraction, host: Host) -> None:
    exact, found = divided(capacity, host), divided(capacity, host, float)
    assert np.allclose(found.entitlement, exact.entitlement.astype(float), atol=1e-6)


@given(st.lists(capacities, min_size=1, max_size=4), st.data())
def test_many_divisions_at_once_are_those_one_by_one(capacity: list[Fraction], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(weights, amounts, amounts, amounts), min_size=1, max_size=10))
    owner = data.draw(st.lists(st.integers(0, len(capacity) - 1), min_size=len(rows), max_size=len(rows)))
    table = np.array(rows, dtype=object)
    together = fill_each(np.array(capacity, dtype=object), np.array(owner), *table.T)
    for number, one in enumerate(capacity):
        mine = np.array(owner) == number
        if mine.any():
            alone = fill(one, *table[mine].T)
            assert list(together.entitlement[mine]) == list(alone.entitlement)
            assert together.level[number] == alone.level


def test_ten_thousand_vms_in_a_hundred_projects_agree_with_the_division_of_each_project() -> None:
    random = np.random.default_rng(7)
    count, projects = 10_000, 100
    owner = random.integers(0, projects, count)
    vms = Parties(random.uniform(1, 1000, count), random.uniform(0, 0.1, count), random.uniform(0.1, 4, count))
    demand = random.uniform(0, 4, count)
    tops = Parties(random.uniform(1, 1000, projects), np.zeros(projects), np.full(projects, 128.0))
    found = divide(4000.0, tops, vms, demand, owner)
    for project in range(projects):
        mine = owner == project
        alone = fill(
            found.share[project], vms.weight[mine], vms.reserve[mine], vms.limit[mine], demand[mine]
        ).entitlement
        assert np.allclose(found.entitlement[mine], alone, atol=1e-9)
