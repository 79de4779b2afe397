"""Dominant-resource fairness: several resources divided among users who each need them in a fixed proportion.

User i wants the amounts d_ir and uses x_i·d_ir, 0 ≤ x_i ≤ 1. Its dominant share is s_i = x_i·δ_i with
δ_i = max_r d_ir/C_r: its part of the resource of which it takes the largest part. Progressive filling raises all
s_i/w_i together; who has all it wants stops, and so does everybody who needs a resource that is used up (Ghodsi et al.,
Dominant Resource Fairness, NSDI 2011). As long as nothing is used up, resource r has level λ_r where water-filling with
weights w_i·d_ir/δ_i uses it up; the lowest λ_r is the next to be reached. So there is one round for each resource, not
for each user, and with one resource it is :func:`~corral.scheduler.shares.fill.fill`. Exact with arrays of Fractions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from corral.scheduler.shares.fill import Numbers, fill


def dominant(capacity: Numbers, weight: Numbers, wanted: Numbers) -> Numbers:
    """What each user gets of each resource, users × resources, in the units of ``capacity``.

    Args:
        capacity: of each resource, > 0.
        weight: of each user, > 0.
        wanted: users × resources, ≥ 0.
    """
    users, resources = wanted.shape
    part = (wanted / capacity).max(axis=1) if users else wanted.sum(axis=1)
    needs = wanted > 0
    served = np.zeros(users, dtype=wanted.dtype) + (part == 0)  # x; who wants nothing has it
    free = part > 0
    left = capacity.copy()
    for _ in range(resources):
        levels = [_level(left[r], weight, part, wanted[:, r], free & needs[:, r]) for r in range(resources)]
        tightest = min(range(resources), key=levels.__getitem__)
        level = levels[tightest]
        stops = free & (needs[:, tightest] if level != float("inf") else True)
        served[stops] = np.minimum(1, level * weight[stops] / part[stops])
        free &= ~stops
        left = left - (served[stops, None] * wanted[stops]).sum(axis=0)
        if not free.any():
            break
    result: Numbers = served[:, None] * wanted
    return result


def _level(left: Any, weight: Numbers, part: Numbers, wanted: Numbers, users: Numbers) -> Any:
    """λ at which these users have used up a resource; infinite when it is enough for all of them."""
    if not users.any():
        return float("inf")
    most = wanted[users]
    return fill(left, weight[users] * most / part[users], 0 * most, most, most).level
