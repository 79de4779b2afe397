"""From plans and demands to what each VM gets: entitlement, the weight that stands for it, and its cap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from corral.governor.protocol import ProjectPlan, VmPlan
from corral.scheduler.shares.fill import total
from corral.scheduler.shares.nested import Parties, divide

LEAST = 1e-3
"""Cores that anybody can count on: a weight of 0 would starve a guest that wakes up between two decisions."""
SHORT = 1e-9
"""Cores. Rounding is less than this, a real shortage more."""


class Demand(NamedTuple):
    """A VM and what it wants now, cores. ``most``: what it may use now (its limit, more while it spends a burst)."""

    plan: VmPlan
    wanted: float
    most: float


class Grant(NamedTuple):
    """``entitled``: of what it wants. ``granted``: what it can count on if it wants more; never 0. Cores."""

    entitled: float
    granted: float


def entitlements(capacity: float, demands: list[Demand], projects: tuple[ProjectPlan, ...]) -> list[Grant]:
    """Water-filling over projects, then over the VMs of each (:mod:`corral.scheduler.shares.nested`)."""
    if not demands:
        return []
    numbers = {name: n for n, name in enumerate(dict.fromkeys(demand.plan.project for demand in demands))}
    project = np.array([numbers[demand.plan.project] for demand in demands])
    plans = {plan.name: plan for plan in projects}
    rows = [
        (plan.weight, plan.reserve, capacity if plan.limit is None else plan.limit)
        for plan in (plans.get(name, ProjectPlan(name=name)) for name in numbers)
    ]
    tops = Parties(*np.array(rows).T)
    table = [(d.plan.weight, d.plan.reserve, d.most, d.wanted) for d in demands]
    weight, reserve, most, wanted = np.array(table).T
    division = divide(capacity, tops, Parties(weight, reserve, most), wanted, project)
    asked = total(np.minimum(wanted, most), project, len(numbers))
    # A project that is not short could have more: its VMs can count on what it would get if all were hungry.
    fair = np.minimum(tops.limit, np.maximum(tops.reserve, capacity * tops.weight / tops.weight.sum()))
    short = asked > division.share + SHORT
    room = np.maximum(division.share, fair)
    level = np.where(short, division.level, room / total(weight, project, len(numbers)))[project]
    granted = np.minimum(most, np.maximum(reserve, level * weight))
    hungry = (wanted >= most - SHORT) & short[project]
    granted = np.where(hungry, division.entitlement, np.maximum(granted, LEAST))
    return [Grant(e, g) for e, g in zip(division.entitlement.tolist(), granted.tolist(), strict=True)]
