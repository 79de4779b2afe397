"""What the stores that live in one process have in common: reading, watching and leases over an :class:`Index`.

A subclass says how a transaction becomes durable (:meth:`LocalStore.txn`) and how a lease is recorded. Neighbours:
:mod:`corral.store.memory`, :mod:`corral.store.sqlite`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from corral.errors import Unavailable
from corral.runtime import Runtime
from corral.store.index import Index, filtered
from corral.store.protocol import Batch, Compare, Entry, Op, Snapshot, TxnResult

HISTORY = 10_000
"""Batches kept for watchers: at a thousand changes a second one may be away for ten seconds before it must list."""
HISTORY_SIZE = 4 << 20
"""Bytes of values in them. A daemon that has much to do would else take tens of megabytes for what nobody asks for."""


class LocalStore:
    """Base of the memory and SQLite stores. Not for use by itself."""

    def __init__(self, rt: Runtime, history: int = HISTORY) -> None:
        assert history >= 1
        self._rt, self._history = rt, history
        self._index = Index()
        self._closed = False
        self._news: asyncio.Event = asyncio.Event()
        self._deadlines: dict[int, tuple[float, float]] = {}  # lease → (monotonic deadline, ttl)
        self._reaper: asyncio.Task[None] | None = None

    async def get(self, key: str) -> Entry | None:
        self._check_open()
        return self._index.get(key)

    async def range(self, prefix: str, *, start: str = "", limit: int = 0) -> Snapshot:
        self._check_open()
        return self._index.range(prefix, start, limit)

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        raise NotImplementedError

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Batch]:
        """Batches from ``from_revision`` on, then live ones. Raises WatchLost, or Unavailable once closed."""
        position = max(from_revision, 1)
        while True:
            self._check_open()
            if position <= self._index.revision:
                batches = self._index.since(position)
                for batch in filtered(batches, prefix):
                    yield batch
                position = batches[-1].revision + 1
                continue
            await self._news.wait()

    async def grant(self, ttl_s: float) -> int:
        self._check_open()
        assert ttl_s > 0
        lease = self._rt.random.below((1 << 62) - 1) + 1
        await self._record_lease(lease, ttl_s)
        self._start_lease(lease, ttl_s)
        return lease

    async def keepalive(self, lease: int) -> bool:
        self._check_open()
        if lease not in self._deadlines:
            return False
        ttl = self._deadlines[lease][1]
        self._deadlines[lease] = (self._rt.clock.monotonic() + ttl, ttl)
        return True

    async def revoke(self, lease: int) -> None:
        self._check_open()
        if self._deadlines.pop(lease, None) is not None:
            await self._end_lease(lease)

    async def close(self) -> None:
        """Let go of everything. Watchers get Unavailable."""
        self._closed = True
        self._announce()
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)

    async def _record_lease(self, lease: int, ttl_s: float) -> None:
        raise NotImplementedError

    async def _end_lease(self, lease: int) -> None:
        """Delete the keys of a lease, in one transaction, and then the lease."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")

    def _announce(self) -> None:
        """Wake all watchers. Each waits on the event of its time, so none can miss a change made while it works."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _start_lease(self, lease: int, ttl_s: float) -> None:
        self._index.leases.setdefault(lease, set())
        self._deadlines[lease] = (self._rt.clock.monotonic() + ttl_s, ttl_s)
        if self._reaper is None or self._reaper.done():
            self._reaper = asyncio.get_running_loop().create_task(self._reap(), name="store-leases")

    async def _reap(self) -> None:
        """End leases whose time has come; ends itself when there is none."""
        while self._deadlines:
            now = self._rt.clock.monotonic()
            due = sorted((at, lease) for lease, (at, _) in self._deadlines.items() if at <= now)
            for _, lease in due:
                self._deadlines.pop(lease, None)
                await self._end_lease(lease)
            if self._deadlines:
                # A lease granted meanwhile may be shorter than any known one: never sleep longer than a moment.
                nearest = min(at for at, _ in self._deadlines.values())
                await self._rt.clock.sleep(min(max(nearest - now, 0.01), 0.25))
