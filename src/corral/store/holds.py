"""Who is there for whom: one key for each connection that holds a VM, gone when the connection or its daemon is.

All keys of one process hang on one lease. A connection that ends takes its key away; a process that dies leaves the
lease to run out, which is how much longer everything lives that was held through it. Who reads them:
:mod:`corral.controllers.abandoned`.
"""

from __future__ import annotations

import asyncio

import structlog

from corral.errors import CorralError, NotFound
from corral.runtime import Runtime
from corral.store.protocol import Delete, Put, Store

log = structlog.get_logger("holds")

PREFIX = "/holds/"
LEASE_S = 20.0
"""A daemon that was killed has this long to come back and be found again by those who hold: it starts in seconds."""
EVERY_S = LEASE_S / 4
RETRY_S = 0.5


def held_by(key: str) -> str:
    """The id of the VM that a key holds."""
    return key.split("/")[2]


class Holds:
    """The holds of this process. Nothing lasts unless :meth:`run` does."""

    def __init__(self, store: Store, rt: Runtime) -> None:
        self._store, self._rt = store, rt
        self._lease = 0
        self._held: set[str] = set()
        self._over: set[str] = set()
        self._turn = asyncio.Event()
        self._granting = asyncio.Lock()

    async def take(self, vm_id: str) -> str:
        """Hold a VM; the key, for :meth:`release`. Any number may hold the same one."""
        key = f"{PREFIX}{vm_id}/{self._rt.random.id()}"
        self._held.add(key)
        try:
            await self._put([key])
        except BaseException:
            self.release(key)  # it may have been written
            raise
        return key

    def release(self, key: str) -> None:
        """Hold no longer. Returns at once, so that whoever is being cancelled can call it; :meth:`run` does it."""
        self._held.discard(key)
        self._over.add(key)
        self._turn.set()

    async def run(self) -> None:
        """Prolong what is held and remove what is over, until cancelled."""
        while True:
            self._turn.clear()
            try:
                await self._remove()
                if self._held and not await self._prolonged():
                    await self._put(sorted(self._held))  # we were away for too long: who is still here holds again
                pause = EVERY_S
            except CorralError as error:
                log.warning("holds could not be written, tried again", error=error.message)
                pause = RETRY_S
            try:
                async with asyncio.timeout(pause):
                    await self._turn.wait()
            except TimeoutError:
                continue

    async def _prolonged(self) -> bool:
        """Whether the lease lives, from now on for its whole time."""
        lease = self._lease
        if lease and await self._store.keepalive(lease):
            return True
        if lease == self._lease:
            self._lease = 0
        return False

    async def _leased(self) -> int:
        """The lease, certain to live for its whole time: one that nobody needed for a while may be about to end."""
        async with self._granting:  # of two that are granted at once only one would be prolonged
            if not await self._prolonged():
                self._lease = await self._store.grant(LEASE_S)
            return self._lease

    async def _put(self, keys: list[str]) -> None:
        lease = await self._leased()
        try:
            await self._store.txn([], [Put(key, b"", lease) for key in keys])
        except NotFound:
            await self._put(keys)

    async def _remove(self) -> None:
        over = sorted(self._over)
        if over:
            await self._store.txn([], [Delete(key) for key in over])
            self._over.difference_update(over)
