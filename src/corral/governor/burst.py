"""Burst credit: CPU time that a plan saves up while it uses less than its limit, and spends above it.

    saved(t) = saved(t-1) + (limit − used)·Δ, between 0 and burst        most(t) = limit + saved(t)/SPEND_S

A token bucket whose last tokens are spent gently: as what is saved runs out, use comes down to the limit exponentially
instead of over a cliff. In any time t a VM uses at most limit·t + burst.
"""

from __future__ import annotations

from corral.governor.protocol import VmPlan

SPEND_S = 1.0
"""What is saved could be spent in this time. Decisions come every 100 to 250 ms: none of them spends more than a
quarter of what there is."""


def most(plan: VmPlan, saved: float) -> float:
    """Cores that a VM may use now: as many as it has CPUs, or its limit and what it saved."""
    cpus = float(len(plan.threads))
    return cpus if plan.limit is None else min(cpus, plan.limit + saved / SPEND_S)


def save(plan: VmPlan, saved: float, used: float, since: float) -> float:
    """What is saved, CPU-seconds, after ``used`` CPU-seconds in ``since`` seconds."""
    if plan.limit is None:
        return 0.0
    return min(plan.burst, max(0.0, saved + plan.limit * since - used))
