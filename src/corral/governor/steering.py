"""Which core each hungry thread has, while there is not enough for all: a packing, turns, or both.

- Where entitlements can be packed onto the cores exactly, threads stay there, and the kernel divides each core by
  weight.
- It does so to a per cent, until something comes between: a core had less to give than the others, or threads were
  moved, and for about 100 ms after that weights mean little. Then a few threads take turns for a moment, until nobody
  is owed much: on the cores where they are, or on any core if it was a whole core that got too little.
- Where no packing is exact a few take turns all the time; many alternate between packings, by deficit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from corral.governor.guardian import TELL_S
from corral.governor.watched import Hands, Watched
from corral.scheduler.shares.few import MOST, Few, steer_few
from corral.scheduler.shares.steer import Threads, distances, drift, pack, settle, steer
from corral.scheduler.shares.turns import Turn, misdivided, turns, turns_within

TICK_S = 0.02
"""A turn, where turns are all there is: shorter ones would be more even, and cost more."""
SHORT_TICK_S = 0.01
"""A turn, where turns last for a moment."""
QUIET_TICK_S = 0.05
"""The present assignment is exact, and looked after."""
LOOK_S = 0.25
EXACT = 0.004
"""An assignment that serves everybody this exactly needs no steering: weights on one core are off by 0.7 %."""
TOLERATED = 0.01
"""A thread may drift from what it is entitled to by this part of a second until the next tick."""
MISDIVIDED_S, WELL_DIVIDED_S = 0.008, 0.004
"""Threads that share a core take turns on it from this deficit against each other on, until it is below the other."""
OWING_S, REPAID_S = 0.025, 0.01
"""They take turns on all cores from this deficit on, until it is below the other."""
SETTLE_S = 0.1
"""After threads were moved to a core the kernel's division of it means little for so long."""
BELOW_CAP = 0.02
"""Cores by which a VM must be below its cap to take turns."""
MOST_IN_TURN = 2.5
"""Threads for each core that take turns: with more each would wait for long, and an alternating packing is not far
off."""
ASLEEP = 0.5
"""An owner of a core that was busy for less of its turn, and is not runnable at its end, wants it no longer."""
SMOOTH_S = 0.5
"""Time constant of what a core has for VMs (the rest is other programs')."""

Who = list[tuple[Watched, int]]
"""Hungry threads: their VM, and their number in it."""


class Ran(NamedTuple):
    """CPU seconds of bound threads, by core; and which cores had any."""

    per_core: list[float]
    held: list[bool]


class Steering:
    """``nodes``: NUMA node of each CPU; ``physical``: its physical core; ``weigh``: sets a VM's weight as it is now."""

    def __init__(
        self, hands: Hands, nodes: list[int], physical: list[int] | None, weigh: Callable[[Watched], None]
    ) -> None:
        self._hands, self._weigh = hands, weigh
        self._physical = np.array(physical if physical is not None else range(len(nodes)))
        self._far = distances(np.array(nodes), self._physical)
        self._far_few = self._far.tolist()
        self._cores = len(nodes)
        self._available = [1.0] * self._cores
        self._exact = self._anywhere = False
        self.by_turns = False
        """Weights say whose turn it is, not who is entitled to how much."""
        self._moved_at = -math.inf
        self._guarded_at: float | None = None
        self._packed: tuple[object, list[int], float] | None = None

    def saw(self, ran: Ran, since: float) -> None:
        """What each core had for VMs in the last ``since`` seconds."""
        keep = math.exp(-since / SMOOTH_S)
        for core, (seconds, held) in enumerate(zip(ran.per_core, ran.held, strict=True)):
            seen = min(1.0, max(0.05, seconds / since))
            self._available[core] = keep * self._available[core] + (1 - keep) * seen if held else 1.0

    def step(self, vms: list[Watched]) -> float:
        """Move threads where it is worth it. Returns seconds until the next step."""
        if self.by_turns:
            self._pass_over_sleepers(vms)
        who = [(vm, n) for vm in vms for n, hungry in enumerate(vm.hungry) if hungry]
        if not who:
            return LOOK_S
        threads = self._threads(vms, who)
        best, uneven = self._pack(threads)
        self._exact = uneven < EXACT
        can = self._can_take_turns(who)
        self._anywhere = can and (not self._exact or self._owing(threads)) and self._guarded(vms)
        if self._anywhere:
            self._moved_at = self._hands.now()
            return self._turn(who, threads)
        tick = QUIET_TICK_S if self._exact else min(QUIET_TICK_S, max(TICK_S, TOLERATED / uneven))
        core = self._chosen(threads, best, tick)
        if core != threads.core:
            self._moved_at = self._hands.now()
        if can and not self._in_hand(threads) and self._guarded(vms):
            return self._turn(who, threads._replace(core=core))
        self._nobody_waits(vms)
        self._place(who, core)
        return tick

    def release(self, vms: list[Watched]) -> None:
        """Let every thread run anywhere; weights stay, they are fair by themselves."""
        self._anywhere, self._packed = False, None
        self._nobody_waits(vms)
        for vm in vms:
            for number in range(len(vm.core)):
                self.unpin(vm, number)

    def unpin(self, vm: Watched, number: int) -> None:
        if vm.core[number] >= 0:
            vm.core[number] = -1
            self._hands.pin(vm.plan.id, number, None)

    def _threads(self, vms: list[Watched], who: Who) -> Few:
        number = {vm.plan.id: k for k, vm in enumerate(vms)}
        parts = [sum(vm.hungry) for vm, _ in who]
        threads = Few(
            [min(1.0, max(1e-6, vm.grant.entitled / part)) for (vm, _), part in zip(who, parts, strict=True)],
            [vm.credit / part for (vm, _), part in zip(who, parts, strict=True)],
            [vm.core[n] for vm, n in who],
            [number[vm.plan.id] for vm, _ in who],
        )
        return threads._replace(core=self._settled(threads)) if min(threads.core) < 0 else threads

    def _place(self, who: Who, core: list[int]) -> None:
        for (vm, n), new in zip(who, core, strict=True):
            if vm.core[n] != new:
                vm.core[n] = new
                self._hands.pin(vm.plan.id, n, new)

    def _can_take_turns(self, who: Who) -> bool:
        """A weight is a VM's, so each may have one thread here; nobody should wait for many others; and one that its
        cap holds up would let its turn pass."""
        alone = all(len(vm.times) == 1 and vm.grant.entitled < vm.cap - BELOW_CAP for vm, _ in who)
        return alone and self._cores < len(who) <= min(MOST, self._cores * MOST_IN_TURN)

    def _owing(self, threads: Few) -> bool:
        """Somebody is owed so much that a core should be theirs, whichever it is."""
        return max(map(abs, threads.deficit)) > (REPAID_S if self._anywhere else OWING_S)

    def _in_hand(self, threads: Few) -> bool:
        """The kernel divides each core by weight, as it is told to."""
        settled = self._hands.now() - self._moved_at >= SETTLE_S
        off = misdivided(threads.entitled, threads.deficit, threads.core)
        return settled and off < (WELL_DIVIDED_S if self.by_turns else MISDIVIDED_S)

    def _turn(self, who: Who, threads: Few) -> float:
        """Give the cores to those who are owed most."""
        self.by_turns = True
        now, tick = Turn(threads.core, [not vm.waits for vm, _ in who]), SHORT_TICK_S if self._exact else TICK_S
        if self._anywhere:
            turn = turns(threads.entitled, threads.deficit, now, self._cores, tick)
        else:
            turn = turns_within(threads.entitled, threads.deficit, now, tick)
        self._place(who, turn.core)
        for (vm, _), own in zip(who, turn.owns, strict=True):
            vm.waits = not own
            self._weigh(vm)
        return tick

    def _pass_over_sleepers(self, vms: list[Watched]) -> None:
        """An owner that has fallen asleep would leave its core idle for as long as it is its turn."""
        for vm in vms:
            for number, core in enumerate(vm.core):
                owns = core >= 0 and not vm.waits
                if owns and vm.busy[number] < ASLEEP and not self._hands.runnable(vm.plan.id, number):
                    vm.hungry[number] = False
                    self.unpin(vm, number)

    def _guarded(self, vms: list[Watched]) -> bool:
        """Nobody is left waiting by a governor that dies: another process would give all their weights."""
        now = self._hands.now()
        if self._guarded_at is None or now - self._guarded_at >= TELL_S:
            guarded = self._hands.guard({vm.plan.id: vm.grant.granted for vm in vms})
            self._guarded_at = now if guarded else None
        return self._guarded_at is not None

    def _nobody_waits(self, vms: list[Watched]) -> None:
        self.by_turns = False
        for vm in vms:
            if vm.waits:
                vm.waits = False
                self._weigh(vm)
        if self._guarded_at is not None:
            self._guarded_at = None
            self._hands.relieve()

    def _settled(self, threads: Few) -> list[int]:
        entitled, _, core, siblings = map(np.array, threads)
        placed = settle(entitled, core, np.ones(self._cores), siblings, self._physical)
        return [int(one) for one in placed]

    def _pack(self, threads: Few) -> tuple[list[int], float]:
        """The best lasting assignment, and how unevenly it serves; computed again when who is hungry changes."""
        whole = sum(threads.entitled)
        asked = (threads.siblings, [round(part / whole, 2) for part in threads.entitled])
        if self._packed is None or self._packed[0] != asked:
            arrays = Threads(*map(np.array, threads))
            best = pack(arrays, self._far)
            uneven = drift(arrays.entitled, best, np.ones(self._cores))
            self._packed = (asked, [int(core) for core in best], uneven)
        elif self._exact and not self._anywhere:  # whole cores may have been exchanged since
            return threads.core, self._packed[2]
        return self._packed[1], self._packed[2]

    def _chosen(self, threads: Few, best: list[int], tick: float) -> list[int]:
        """The assignment for the next tick. An exact one stays, but for cores exchanged with all that is on them."""
        start = threads._replace(core=best) if self._exact else threads
        if len(start.core) <= MOST:
            return steer_few(start, self._available, tick, self._far_few, whole=self._exact)
        arrays, available = Threads(*map(np.array, start)), np.array(self._available)
        return [int(core) for core in steer(arrays, available, tick, self._far, whole=self._exact)]
