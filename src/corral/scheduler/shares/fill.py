"""Water-filling: a capacity divided by weights, within what each wants and between what each may have.

With u_i = min(limit_i, demand_i) and f_i = min(reserve_i, u_i),

    e_i(λ) = min(u_i, max(f_i, λ·w_i)),   λ such that Σ e_i = min(C, Σ u_i)

Σ e(λ) is monotone and piecewise linear with breakpoints f_i/w_i (i begins to rise) and u_i/w_i (i is full): sorted, the
level is found exactly in O(n log n) (the water-filling of max-min fairness, Bertsekas & Gallager, Data Networks, 6.5.2,
with weights and floors). Many divisions are done at once: everybody's breakpoints lie in one array, sorted by division
and then by level, and one running sum serves them all. With arrays of Fractions (``dtype=object``) the same code is
exact. :mod:`~corral.scheduler.shares.nested` puts two of these on top of each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
Groups = NDArray[np.integer[Any]]


class Filling(NamedTuple):
    """``entitlement`` of each, in the unit of the capacity; ``level``: λ, infinite when all have what they want."""

    entitlement: Numbers
    level: Any


def fill(capacity: Any, weight: Numbers, reserve: Numbers, limit: Numbers, demand: Numbers) -> Filling:
    """Divide ``capacity``. Arrays of one length: weights > 0, the rest ≥ 0, in the unit of the capacity.

    Reservations that are more than the capacity are cut alike (λ is 0 then): admission keeps that from happening, a
    host that loses a CPU does not.
    """
    capacities = np.array([capacity], dtype=np.asarray(weight).dtype)
    filled = fill_each(capacities, np.zeros(len(weight), dtype=np.int16), weight, reserve, limit, demand)
    return Filling(filled.entitlement, filled.level[0])


def fill_each(
    capacity: Numbers, group: Groups, weight: Numbers, reserve: Numbers, limit: Numbers, demand: Numbers
) -> Filling:
    """Divide each ``capacity[g]`` among the members of group g; ``group``: whose member each is.

    As many :func:`fill` as there are capacities, in the time of one. ``level`` has one entry for each group.
    """
    most = np.minimum(limit, demand)
    least = np.minimum(reserve, most)
    want, floor = total(most, group, len(capacity)), total(least, group, len(capacity))
    level = np.full(len(capacity), float("inf"), dtype=capacity.dtype)
    poor = (want > capacity) & (floor >= capacity)
    level[poor] = 0
    short = (want > capacity) & ~poor
    mine = short[group]
    if mine.any():
        number = np.cumsum(short) - 1
        level[short] = _levels((capacity - floor)[short], number[group[mine]], weight[mine], least[mine], most[mine])
    entitlement = np.minimum(most, np.maximum(least, level[group] * weight))
    cut = poor[group]
    if cut.any():
        entitlement[cut] = least[cut] * capacity[group[cut]] / np.where(floor == 0, 1, floor)[group[cut]]
    return Filling(entitlement, level)


def total(values: Numbers, group: Groups, groups: int) -> Numbers:
    """Sum of each group."""
    sums = np.zeros(groups, dtype=values.dtype)
    np.add.at(sums, group, values)
    return sums


def _levels(capacity: Numbers, group: Groups, weight: Numbers, least: Numbers, most: Numbers) -> Numbers:
    """λ of each group that divides ``capacity``, which is what is left above the floors and less than all want."""
    at = np.concatenate((least / weight, most / weight))
    slope = np.concatenate((weight, -weight))
    # A stable sort of 16-bit numbers is a radix sort: the second one costs next to nothing.
    narrow = np.concatenate((group, group)).astype(np.int16 if len(capacity) < 1 << 15 else np.int64)
    order = np.argsort(at, kind="stable")
    order = order[np.argsort(narrow[order], kind="stable")]
    at, slope, owner = at[order], slope[order], narrow[order]
    last = np.searchsorted(owner, np.arange(len(capacity)), side="right") - 1
    first = np.concatenate(([0], last[:-1] + 1))
    rising = np.cumsum(slope)  # every group's slopes add up to 0, so this begins anew with each
    step = rising[:-1] * (at[1:] - at[:-1])
    step[last[:-1]] = 0  # from one group to the next
    filled = np.concatenate((at[:1] - at[:1], np.cumsum(step)))  # above the floors, at each breakpoint, groups in a row
    wanted = filled[first] + capacity
    segment = np.clip(np.searchsorted(filled, wanted, side="left") - 1, first, last - 1)
    found: Numbers = at[segment] + (wanted - filled[segment]) / rising[segment]
    return found
