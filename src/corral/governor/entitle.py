"""From plans and demands to what each VM gets: entitlement, the weight that stands for it, and its cap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from corral.governor.protocol import ProjectPlan, VmPlan
from corral.scheduler.shares.fill import fill


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
    """Water-filling over projects, then over the VMs of each (:mod:`corral.scheduler.shares`)."""
    members: dict[str, list[int]] = {}
    for number, demand in enumerate(demands):
        members.setdefault(demand.plan.project, []).append(number)
    plans = {plan.name: plan for plan in projects}
    found = [plans.get(name, ProjectPlan(name=name)) for name in members]
    wanted = [sum(min(demands[n].wanted, demands[n].most) for n in mine) for mine in members.values()]
    shares = fill(
        capacity,
        np.array([plan.weight for plan in found], dtype=float),
        np.array([plan.reserve for plan in found], dtype=float),
        np.array([capacity if plan.limit is None else plan.limit for plan in found], dtype=float),
        np.array(wanted, dtype=float),
    )
    grants = [Grant(0.0, 0.0)] * len(demands)
    for plan, mine, share, want in zip(found, members.values(), shares.entitlement, wanted, strict=True):
        # A project that is not short could have more: its VMs can count on what it would get if all were hungry.
        room = float(share) if share < want - 1e-9 else max(float(share), _fair(capacity, plan, found))
        for number, grant in zip(mine, _within(float(share), room, [demands[n] for n in mine]), strict=True):
            grants[number] = grant
    return grants


def _fair(capacity: float, plan: ProjectPlan, plans: list[ProjectPlan]) -> float:
    fair = capacity * plan.weight / sum(other.weight for other in plans)
    return min(capacity if plan.limit is None else plan.limit, max(plan.reserve, fair))


def _within(share: float, room: float, demands: list[Demand]) -> list[Grant]:
    weight = np.array([d.plan.weight for d in demands], dtype=float)
    reserve = np.array([d.plan.reserve for d in demands], dtype=float)
    most = np.array([d.most for d in demands], dtype=float)
    wanted = np.array([d.wanted for d in demands], dtype=float)
    filled = fill(share, weight, reserve, most, wanted)
    short = float(np.minimum(wanted, most).sum()) > share + 1e-9
    level = float(filled.level) if short else room / float(weight.sum())
    granted = np.minimum(most, np.maximum(reserve, level * weight))
    hungry = wanted >= most - 1e-9
    granted = np.where(hungry & short, filled.entitlement, np.maximum(granted, 1e-3))
    return [Grant(float(e), float(g)) for e, g in zip(filled.entitlement, granted, strict=True)]
