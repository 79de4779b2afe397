"""Whose turn it is: each core for one thread at a time, by deficit (entitled − used).

Where no packing serves everybody exactly, threads have to change cores, and for about 100 ms after a change the
kernel's weights on that core mean little: they follow load averages of the groups. So nothing is left to weights then.
Every 20 ms the cores go to the threads with the largest deficits, each for itself; who waits is behind an owner, with
next to no weight, and runs only while the owner sleeps. What is left of unfairness is one turn: 20 ms.

Largest lag first, as in Stoica et al., "A Proportional Share Resource Allocation Algorithm for Real-Time, Time-Shared
Systems" (RTSS 1996), with cores in place of one processor.
"""

from __future__ import annotations

from typing import NamedTuple

KEEP_S = 0.002
"""What an owner's deficit counts more, s: a turn that has just begun is not given up for a difference that the kernel's
own slices make."""


class Turn(NamedTuple):
    """A core for each thread, and whether it owns it."""

    core: list[int]
    owns: list[bool]


def turns_within(entitled: list[float], deficit: list[float], now: Turn, tick: float) -> Turn:
    """Whose turn it is on each core for the next ``tick`` seconds, among those who are on it already."""
    due = [d + e * tick + (KEEP_S if owns else 0.0) for e, d, owns in zip(entitled, deficit, now.owns, strict=True)]
    first = {core: max((i for i, c in enumerate(now.core) if c == core), key=lambda i: due[i]) for core in now.core}
    return Turn(now.core, [first[core] == i for i, core in enumerate(now.core)])


def misdivided(entitled: list[float], deficit: list[float], core: list[int]) -> float:
    """The largest deficit or surplus, in seconds, that a thread has against those it shares its core with.

    What a core as a whole got too little of is none of it: another division of the core would not help.
    """
    load, owed = dict.fromkeys(core, 0.0), dict.fromkeys(core, 0.0)
    for e, d, c in zip(entitled, deficit, core, strict=True):
        load[c] += e
        owed[c] += d
    return max(abs(d - e * owed[c] / load[c]) for e, d, c in zip(entitled, deficit, core, strict=True))


def turns(entitled: list[float], deficit: list[float], now: Turn, cores: int, tick: float) -> Turn:
    """Whose turn it is for the next ``tick`` seconds, with as few moves as that allows.

    Args:
        entitled: cores, of each thread; at least as many threads as ``cores``.
        deficit: seconds, of each thread.
        now: where the threads are, and who owned a core until now.
    """
    due = [d + e * tick + (KEEP_S if owns else 0.0) for e, d, owns in zip(entitled, deficit, now.owns, strict=True)]
    chosen = sorted(sorted(range(len(due)), key=lambda i: -due[i])[:cores], key=lambda i: not now.owns[i])
    core = list(now.core)
    free = set(range(cores))
    homeless = []
    for i in chosen:  # those who go on first: they keep what they have
        if core[i] in free:
            free.remove(core[i])
        else:
            homeless.append(i)
    for i in homeless:
        core[i] = free.pop()
    owns = [False] * len(due)
    for i in chosen:
        owns[i] = True
    # Who waits does so where a core is given up soonest; then its turn needs no move.
    ahead = {core[i]: due[i] - tick for i in chosen}
    for i in sorted((i for i in range(len(due)) if not owns[i]), key=lambda i: -due[i]):
        core[i] = min(range(cores), key=lambda c: (round(ahead[c], 6), c != core[i]))
        ahead[core[i]] += tick  # the next one behind it comes later
    return Turn(core, owns)
