"""Which hungry thread runs on which core, so that all get what they are entitled to.

The kernel divides one core exactly by weights (0.1 % over 10 s); across cores its load balancing is off by tens of per
cent over a second. So threads are assigned to cores here, and the kernel only divides each core. Where the entitlements
can be packed onto the cores exactly, one assignment stays; where some thread has to straddle, the assignment
alternates, steered by deficit (entitled − used): each assignment is sane by itself, so it does no harm if nobody steers
any more.

With e the entitlements (weights on a core are proportional to them), a_c what core c has for these threads and
L_c = Σ e over its threads, thread i is served at the rate e_i·a_c/L_c. After Δ seconds its deficit D_i will be
D_i − e_i·k_c with k_c = Δ·(a_c/L_c − 1). The weighted squares Σ D_i²/e_i that result are, up to a constant,

    Φ = Σ_c ( −2·k_c·S_c + k_c²·L_c ),   S_c = Σ D over the threads of core c

so a move, a swap of two threads or an exchange of two cores changes two terms only, and all of them are tried at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Cores = NDArray[np.intp]

IDLE_COST = 1e3
"""Φ of a core without threads: nothing is worth leaving a core idle while threads wait."""
MOVE_COST = 5e-6
"""What a move must gain, s: a deficit of 2 ms. Less is within what the kernel's own slices make uneven for a moment."""
CORE_COST = 5e-6
"""More for one to another physical core, which leaves its caches behind: 3 ms in all. Between the two threads of one
core (SMT) they stay."""
SETTLE_COST = 2.5e-4
"""More for an exchange of cores, for each that has several threads: 16 ms. In the 100 ms after it the kernel still
counts their groups' load on the core they left, and divides the new one as it comes (measured: 97 ms to 3)."""
FAR_COST = 1e-4
"""More for one between NUMA nodes, which leaves its memory behind: 10 ms."""
PERIOD_S = 1.0
"""The horizon of an assignment that is to stay."""
ROUNDS = 4
"""Improvements in one step; what is left is improved in the next one, 20 ms later."""


class Threads(NamedTuple):
    """Hungry threads. ``entitled``: cores, > 0, at most 1 each. ``deficit``: seconds. ``core``: index of its core.

    ``siblings``: number of its VM; threads of one VM on one core would wait for each other.
    """

    entitled: Floats
    deficit: Floats
    core: Cores
    siblings: Cores


def distances(node: Cores, physical: Cores) -> Floats:
    """What a move from each CPU (row) to each other must gain more than one that leaves nothing behind.

    ``node``: NUMA node of each CPU; ``physical``: its physical core, of which it may be one of two threads.
    """
    other = np.where(physical[:, None] != physical[None, :], CORE_COST, 0.0)
    return np.asarray(other + np.where(node[:, None] != node[None, :], FAR_COST, 0.0))


def settle(entitled: Floats, core: Cores, available: Floats, siblings: Cores, physical: Cores | None = None) -> Cores:
    """A core for each thread that has none yet (``core`` −1); the others stay.

    Of CPUs with equal room the one whose physical core has most: two busy threads on one core (SMT) get less each.

    Longest-processing-time rule (Graham 1969): largest first, each to the core with most room, if possible to one
    where no other thread of its VM is.
    """
    chosen = core.copy()
    placed = chosen >= 0
    room = available - np.bincount(chosen[placed], weights=entitled[placed], minlength=len(available))
    physical = np.arange(len(available)) if physical is None else physical
    for i in np.lexsort((np.arange(len(entitled)), -entitled)):
        if chosen[i] < 0:
            beside = np.isin(np.arange(len(room)), chosen[siblings == siblings[i]])
            around = np.bincount(physical, weights=room)[physical]
            chosen[i] = np.lexsort((-np.round(around, 6), -np.round(room, 6), beside))[0]
            room[chosen[i]] -= entitled[i]
    return chosen


class Loaded(NamedTuple):
    """Cores and what is on them: ``load`` Σ e, ``owed`` Σ D, ``available``, and their Φ, ``horizon`` seconds ahead."""

    load: Floats
    owed: Floats
    available: Floats
    cost: Floats
    horizon: float


def cost(load: Any, owed: Any, available: Any, horizon: float) -> Any:
    """Φ of cores with these loads, deficits and capacities, ``horizon`` seconds ahead."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = horizon * (available / load - 1.0)
        return np.where(load > 1e-9, gain * (gain * load - 2.0 * owed), IDLE_COST)


def pack(threads: Threads, far: Floats) -> Cores:
    """The assignment that serves everybody most equally for good: the better one of improving the present one and of
    beginning anew. Of equal ones the present one, so that it is stable from one period to the next."""
    even = np.ones(len(far))
    still = threads._replace(deficit=np.zeros_like(threads.deficit))
    anew = settle(still.entitled, np.full_like(still.core, -1), even, still.siblings)
    tries = [still.core, *(steer(still._replace(core=core), even, PERIOD_S, far) for core in (still.core, anew))]
    return min(tries, key=lambda core: round(drift(still.entitled, core, even), 4))


def steer(threads: Threads, available: Floats, horizon: float, far: Floats, *, whole: bool = False) -> Cores:
    """The assignment for the next ``horizon`` seconds, reached from the present one by as few moves as are worth it.

    Args:
        available: what each core has for these threads, cores (1 minus what others use there).
        far: :func:`distances` between CPUs.
        whole: only exchange whole cores, which keeps who shares a core with whom.
    """
    core = threads.core.copy()
    for _ in range(ROUNDS):
        load = np.bincount(core, weights=threads.entitled, minlength=len(available)).astype(float)
        owed = np.bincount(core, weights=threads.deficit, minlength=len(available)).astype(float)
        now = Loaded(load, owed, available, cost(load, owed, available, horizon), horizon)
        shared = np.where(np.bincount(core, minlength=len(available)) > 1, SETTLE_COST, 0.0)
        exchanges = _exchanges(now) + 2 * far + shared[:, None] + shared[None, :]
        a, b = np.unravel_index(int(exchanges.argmin()), exchanges.shape)
        best, chosen = float(exchanges[a, b]) + 2 * MOVE_COST, _exchanged(core, int(a), int(b))
        if not whole:
            moves = _moves(threads, core, now) + far[core]
            swaps = _swaps(threads, core, now) + 2 * far[np.ix_(core, core)]
            _forbid_siblings(moves, swaps, core, threads.siblings)
            i, to = np.unravel_index(int(moves.argmin()), moves.shape)
            if moves[i, to] + MOVE_COST < best:
                best, chosen = float(moves[i, to]) + MOVE_COST, core.copy()
                chosen[i] = to
            i, j = np.unravel_index(int(swaps.argmin()), swaps.shape)
            if swaps[i, j] + 2 * MOVE_COST < best:
                best, chosen = float(swaps[i, j]) + 2 * MOVE_COST, core.copy()
                chosen[i], chosen[j] = core[j], core[i]
        if best >= 0:
            break
        core = chosen
    return core


def drift(entitled: Floats, core: Cores, available: Floats) -> float:
    """How unequally the present assignment serves: the largest relative error of a core's rate; 0 when it is exact.

    Against the mean over all cores, which is what everybody can have.
    """
    load = np.bincount(core, weights=entitled, minlength=len(available))
    mean = float(available.sum()) / max(float(load.sum()), 1e-9)
    rates = available[load > 0] / load[load > 0]
    return float(np.abs(rates / mean - 1.0).max()) if len(rates) and mean > 0 else 0.0


def _moves(threads: Threads, core: Cores, now: Loaded) -> Floats:
    """Change of Φ for each thread (row) moved to each core (column)."""
    entitled, deficit, h = threads.entitled, threads.deficit, now.horizon
    left = cost(now.load[core] - entitled, now.owed[core] - deficit, now.available[core], h) - now.cost[core]
    joined = cost(now.load + entitled[:, None], now.owed + deficit[:, None], now.available, h) - now.cost
    table: Floats = left[:, None] + joined
    table[np.arange(len(core)), core] = 0.0
    return table


def _swaps(threads: Threads, core: Cores, now: Loaded) -> Floats:
    """Change of Φ for each pair of threads that change places."""
    more = threads.entitled[None, :] - threads.entitled[:, None]  # what the core of the row's thread gains in load
    owes = threads.deficit[None, :] - threads.deficit[:, None]
    load, owed, available = now.load[core], now.owed[core], now.available[core]
    here = cost(load[:, None] + more, owed[:, None] + owes, available[:, None], now.horizon)
    there = cost(load[None, :] - more, owed[None, :] - owes, available[None, :], now.horizon)
    table: Floats = here + there - now.cost[core][:, None] - now.cost[core][None, :]
    table[core[:, None] == core[None, :]] = 0.0
    return table


def _exchanges(now: Loaded) -> Floats:
    """Change of Φ for each pair of cores that exchange all their threads: worth it where one has less to give."""
    other = cost(now.load[:, None], now.owed[:, None], now.available[None, :], now.horizon)
    table: Floats = other + other.T - now.cost[:, None] - now.cost[None, :]
    np.fill_diagonal(table, 0.0)
    return table


def _exchanged(core: Cores, a: int, b: int) -> Cores:
    found = core.copy()
    found[core == a], found[core == b] = b, a
    return found


def _forbid_siblings(moves: Floats, swaps: Floats, core: Cores, siblings: Cores) -> None:
    """No move may bring two threads of one VM onto one core, while there are as many cores as it has threads."""
    cores = moves.shape[1]
    for vm in np.unique(siblings):
        mine = np.flatnonzero(siblings == vm)
        if not 1 < len(mine) <= cores:
            continue
        used = core[mine]
        for i in mine:
            theirs = used[mine != i]
            moves[np.ix_([i], theirs)] = np.inf
            blocked = np.flatnonzero(np.isin(core, theirs))
            swaps[i, blocked] = np.inf
            swaps[blocked, i] = np.inf
