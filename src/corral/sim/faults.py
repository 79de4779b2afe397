"""What goes wrong, drawn from the seed: crashes at named points, a store and an engine that are slow, fail or lie.

A store's reply can be lost after the write happened (Unknown), and before it (Unavailable): code that treats the two
alike is found here. After :meth:`Faults.calm` nothing goes wrong any more and everything must converge.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, cast

from corral.errors import Unavailable, Unknown, WatchLost
from corral.sim.narration import Narration
from corral.sim.process import Process
from corral.store.protocol import Batch, Compare, Entry, Op, Snapshot, Store, TxnResult


class Odds(NamedTuple):
    """Probabilities of each kind of fault, each time there is a chance of it."""

    crash_at_point: float = 0.02
    crash_at_write: float = 0.004
    store_down: float = 0.01
    reply_lost: float = 0.01
    watch_lost: float = 0.01
    engine_fails: float = 0.02
    reply_of_engine_lost: float = 0.01
    disk_fails: float = 0.03
    delay: float = 0.2
    longest_delay_s: float = 0.5


class Faults:
    """The dice of one run. One generator for all, rolled in the order of the run: so it repeats."""

    def __init__(self, seed: int, odds: Odds, narration: Narration) -> None:
        self._random = random.Random(f"faults {seed}")
        self._odds, self._narration = odds, narration
        self._on = True
        self._ordered: list[str] = []
        self.count = 0

    @property
    def on(self) -> bool:
        return self._on

    def calm(self) -> None:
        """From now on nothing goes wrong by itself."""
        self._on = False

    def storm(self) -> None:
        """From now on things go wrong again."""
        self._on = True

    def order(self, what: str) -> None:
        """Have one fault happen at the next chance of it, even in the calm. ``what``: the words it is told in."""
        self._ordered.append(what)

    def roll(self, chance: float, what: str) -> bool:
        """Whether it goes wrong this time; told if it does."""
        if what in self._ordered:
            self._ordered.remove(what)
        elif not self._on or self._random.random() >= chance:
            return False
        self.count += 1
        self._narration.tell(f"FAULT {what}")
        return True

    async def delay(self) -> None:
        """Sometimes take a while."""
        if self._on and self._random.random() < self._odds.delay:
            await asyncio.sleep(self._random.uniform(0.0, self._odds.longest_delay_s))

    @property
    def odds(self) -> Odds:
        return self._odds


class ProcessFaults:
    """:class:`corral.runtime.FaultPoints` of one process: at a named point it may die, or be held up."""

    def __init__(self, process: Process, faults: Faults) -> None:
        self._process, self._faults = process, faults

    async def at(self, point: str) -> None:
        self._process.check()
        if self._faults.roll(self._faults.odds.crash_at_point, f"{self._process.name} dies at {point}"):
            self._process.crash()
        await self._faults.delay()
        self._process.check()


class FaultyStore:
    """The store as one process reaches it: slow, away, its replies lost, its watches broken."""

    def __init__(self, store: Store, process: Process, faults: Faults) -> None:
        self._store, self._process, self._faults = store, process, faults

    async def get(self, key: str) -> Entry | None:
        await self._reach()
        return await self._store.get(key)

    async def range(self, prefix: str, *, start: str = "", limit: int = 0) -> Snapshot:
        await self._reach()
        return await self._store.range(prefix, start=start, limit=limit)

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        await self._reach()
        name, odds = self._process.name, self._faults.odds
        if self._faults.roll(odds.crash_at_write, f"{name} dies before a write"):
            self._process.crash()
            await asyncio.sleep(0)
        result = await self._store.txn(compares, then, otherwise)
        if self._faults.roll(odds.crash_at_write, f"{name} dies after a write"):
            self._process.crash()
            await asyncio.sleep(0)
        if self._faults.roll(odds.reply_lost, f"the store's reply to {name} is lost"):
            raise Unknown("the store's reply was lost")
        await self._faults.delay()
        self._process.check()
        return result

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Batch]:
        async with aclosing(cast(Any, self._store.watch(prefix, from_revision))) as batches:
            async for batch in batches:
                self._process.check()
                await self._faults.delay()
                if self._faults.roll(self._faults.odds.watch_lost, f"a watch of {self._process.name} breaks"):
                    raise WatchLost("the watch broke")
                yield batch

    async def grant(self, ttl_s: float) -> int:
        await self._reach()
        return await self._store.grant(ttl_s)

    async def keepalive(self, lease: int) -> bool:
        await self._reach()
        return await self._store.keepalive(lease)

    async def revoke(self, lease: int) -> None:
        await self._reach()
        await self._store.revoke(lease)

    async def close(self) -> None:
        """The store itself outlives its callers."""

    async def _reach(self) -> None:
        self._process.check()
        await self._faults.delay()
        self._process.check()
        if self._faults.roll(self._faults.odds.store_down, f"the store is away for {self._process.name}"):
            raise Unavailable("the store is away")
