"""Projects first, then the VMs of each: water-filling of the host, and of every project's part of it at once.

What a project wants is the sum of what its VMs want, and what it must have at least is its own reservation or the sum
of theirs, whichever is more: a VM's reservation holds however light its project is. Fractions in, fractions out; two
calls of :func:`~corral.scheduler.shares.fill.fill_each`, whatever the number of projects.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from corral.scheduler.shares.fill import Groups, Numbers, fill, fill_each, total


class Parties(NamedTuple):
    """Who takes part, one column for each property; CPU in cores. Weights > 0."""

    weight: Numbers
    reserve: Numbers
    limit: Numbers


class Division(NamedTuple):
    """``entitlement`` of each VM; ``level`` λ of each project, infinite where its VMs have all they want; ``share`` of
    each project."""

    entitlement: Numbers
    level: Numbers
    share: Numbers


def divide(capacity: Any, projects: Parties, vms: Parties, demand: Numbers, project: Groups) -> Division:
    """Entitlements of VMs that want ``demand``; ``project``: index of each one's project."""
    count = len(projects.weight)
    most = np.minimum(vms.limit, demand)
    wanted = total(most, project, count)
    owed = total(np.minimum(vms.reserve, most), project, count)
    floor = np.maximum(projects.reserve, owed)
    share = fill(capacity, projects.weight, floor, projects.limit, wanted).entitlement
    filled = fill_each(share, project, vms.weight, vms.reserve, vms.limit, demand)
    return Division(filled.entitlement, filled.level, share)
