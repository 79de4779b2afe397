"""Steering of a few threads in plain arithmetic: :func:`~corral.scheduler.shares.steer.steer` without numpy.

A host whose entitlements no packing serves exactly usually has few hungry threads, and is steered 50 times a second
by a process that finds its caches cold. There a hundred calls into numpy cost ten times what they compute. The
formulas are those of the neighbour; a property test holds the two to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from corral.scheduler.shares.steer import IDLE_COST, MOVE_COST, ROUNDS, SETTLE_COST

MOST = 12
"""Threads. Beyond that pairs of threads are so many that numpy is faster."""


class Few(NamedTuple):
    """As :class:`~corral.scheduler.shares.steer.Threads`, in lists."""

    entitled: list[float]
    deficit: list[float]
    core: list[int]
    siblings: list[int]


class _Cores:
    """Cores with what is on them now, and Φ of what could be."""

    def __init__(self, threads: Few, core: list[int], available: list[float], horizon: float) -> None:
        self.available, self.horizon = available, horizon
        self.load, self.owed = [0.0] * len(available), [0.0] * len(available)
        for entitled, deficit, c in zip(threads.entitled, threads.deficit, core, strict=True):
            self.load[c] += entitled
            self.owed[c] += deficit
        self.cost = [self.phi(c, self.load[c], self.owed[c]) for c in range(len(available))]

    def phi(self, core: int, load: float, owed: float) -> float:
        """Φ of a core with this load and deficit."""
        if load <= 1e-9:
            return IDLE_COST
        gain = self.horizon * (self.available[core] / load - 1.0)
        return gain * (gain * load - 2.0 * owed)

    def shifted(self, a: int, b: int, load: float, owed: float) -> float:
        """Change of Φ when so much load and deficit goes from core ``a`` to core ``b``."""
        here = self.phi(a, self.load[a] - load, self.owed[a] - owed)
        there = self.phi(b, self.load[b] + load, self.owed[b] + owed)
        return here + there - self.cost[a] - self.cost[b]


def steer_few(
    threads: Few, available: list[float], horizon: float, far: list[list[float]], *, whole: bool = False
) -> list[int]:
    """A core for each thread, for the next ``horizon`` seconds.

    Args:
        available: what each core has for these threads, cores.
        far: what a move from one core (row) to another must gain more.
        whole: only exchange whole cores.
    """
    core = list(threads.core)
    for _ in range(ROUNDS):
        now = _Cores(threads, core, available, horizon)
        best, chosen = 0.0, core
        for change, changed in _changes(threads, core, now, far, whole):
            if change < best:
                best, chosen = change, changed
        if chosen is core:
            break
        core = chosen
    return core


def _changes(
    threads: Few, core: list[int], now: _Cores, far: list[list[float]], whole: bool
) -> Iterator[tuple[float, list[int]]]:
    """What each exchange of cores, move and swap would gain (below zero: better), and the assignment it leads to."""
    cores = range(len(now.load))
    shared = [SETTLE_COST if core.count(c) > 1 else 0.0 for c in cores]
    for a in cores:
        for b in range(a):
            change = now.shifted(a, b, now.load[a] - now.load[b], now.owed[a] - now.owed[b])
            yield (
                change + 2 * (far[a][b] + MOVE_COST) + shared[a] + shared[b],
                [b if c == a else a if c == b else c for c in core],
            )
    if whole:
        return
    together = _together(threads.siblings, core, len(now.load))
    for i, a in enumerate(core):
        entitled, deficit = threads.entitled[i], threads.deficit[i]
        for b in cores:
            if b != a and (i, b) not in together:
                change = now.shifted(a, b, entitled, deficit)
                yield change + far[a][b] + MOVE_COST, [*core[:i], b, *core[i + 1 :]]
        for j in range(i):
            b = core[j]
            if a == b or (i, b) in together or (j, a) in together:
                continue
            change = now.shifted(a, b, entitled - threads.entitled[j], deficit - threads.deficit[j])
            swapped = list(core)
            swapped[i], swapped[j] = b, a
            yield change + 2 * (far[a][b] + MOVE_COST), swapped


def _together(siblings: list[int], core: list[int], cores: int) -> set[tuple[int, int]]:
    """Threads and the cores on which another thread of their VM is: they would wait for each other there."""
    if len(set(siblings)) == len(siblings):
        return set()
    return {
        (i, core[j])
        for i, vm in enumerate(siblings)
        for j, other in enumerate(siblings)
        if i != j and vm == other and siblings.count(vm) <= cores
    }
