"""What agent and governor tell each other: one JSON object a line. CPU in cores, times in seconds."""

from __future__ import annotations

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class VmPlan(Struct, frozen=True, kw_only=True):
    """A running VM. ``pid`` is its QEMU, ``threads`` the ids of its vCPU threads."""

    id: str
    project: str
    pid: int
    threads: tuple[int, ...]
    weight: float = 100.0
    reserve: float = 0.0
    limit: float | None = None
    """None: as many cores as it has vCPUs."""
    burst: float = 0.0
    """CPU-seconds that it may save below its limit, and spend above it."""
    saved: float = 0.0
    """What it had saved when the governor before this one ended; only heeded for a VM that is seen first."""


class ProjectPlan(Struct, frozen=True, kw_only=True):
    name: str
    weight: float = 100.0
    reserve: float = 0.0
    limit: float | None = None


class Plan(Struct, frozen=True, kw_only=True):
    """All VMs of the host, and the projects that they are in. Replaces the plan before it."""

    vms: tuple[VmPlan, ...] = ()
    projects: tuple[ProjectPlan, ...] = ()


class VmReport(Struct, frozen=True, kw_only=True):
    """One VM over the last period, in cores; ``credit`` in CPU-seconds.

    ``entitled``: what it should have had, by its weight and what it wanted. ``granted``: what it could have had at
    least, had it wanted more. ``wait``: threads that were runnable and did not run. ``throttled``: held by its limit.
    """

    id: str
    entitled: float
    granted: float
    used: float
    demand: float
    wait: float
    credit: float
    saved: float = 0.0
    """CPU-seconds saved up for bursts."""
    throttled: float = 0.0


class Report(Struct, frozen=True, kw_only=True):
    """``idle`` and ``foreign`` (what is not VMs) in cores; ``cost``: cores that the governor itself used.

    ``mode``: how shares are enforced, for people. ``steering``: threads are moved between cores right now.
    """

    at: float
    period_s: float
    cores: int
    idle: float
    foreign: float
    cost: float
    mode: str
    steering: bool = False
    vms: tuple[VmReport, ...] = ()
