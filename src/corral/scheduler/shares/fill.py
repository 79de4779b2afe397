"""Water-filling: a capacity divided by weights, within what each wants and between what each may have.

With u_i = min(limit_i, demand_i) and f_i = min(reserve_i, u_i),

    e_i(λ) = min(u_i, max(f_i, λ·w_i)),   λ such that Σ e_i = min(C, Σ u_i)

Σ e(λ) is monotone and piecewise linear with breakpoints f_i/w_i (i begins to rise) and u_i/w_i (i is full): sorted, the
level is found exactly in O(n log n) (the water-filling of max-min fairness, Bertsekas & Gallager, Data Networks, 6.5.2,
with weights and floors). With arrays of Fractions (``dtype=object``) the same code is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


class Filling(NamedTuple):
    """``entitlement`` of each, in the unit of the capacity; ``level``: λ, infinite when all have what they want."""

    entitlement: Numbers
    level: Any


def fill(capacity: Any, weight: Numbers, reserve: Numbers, limit: Numbers, demand: Numbers) -> Filling:
    """Divide ``capacity``. Arrays of one length: weights > 0, the rest ≥ 0, in the unit of the capacity.

    Reservations that are more than the capacity are cut alike (λ is 0 then): admission keeps that from happening, a
    host that loses a CPU does not.
    """
    most = np.minimum(limit, demand)
    least = np.minimum(reserve, most)
    if len(most) == 0 or most.sum() <= capacity:
        return Filling(most, float("inf"))
    floor = least.sum()
    if floor >= capacity:
        return Filling(least * capacity / floor if floor else least, 0)
    level = _level(capacity - floor, weight, least, most)
    return Filling(np.minimum(most, np.maximum(least, level * weight)), level)


def _level(capacity: Any, weight: Numbers, least: Numbers, most: Numbers) -> Any:
    """λ that divides ``capacity``, which is what is left above the floors and less than all want."""
    at = np.concatenate((least / weight, most / weight))
    slope = np.concatenate((weight, -weight))
    order = np.argsort(at, kind="stable")
    at, slope = at[order], np.cumsum(slope[order])
    filled = np.cumsum(slope[:-1] * (at[1:] - at[:-1]))  # above the floors, at each breakpoint but the first
    segment = int(np.searchsorted(filled, capacity, side="left"))
    before = filled[segment - 1] if segment else capacity - capacity
    return at[segment] + (capacity - before) / slope[segment]
