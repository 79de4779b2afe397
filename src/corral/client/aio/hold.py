"""Holding an ephemeral VM, for asyncio; the twin of :mod:`corral.client.sync.hold`: a task reads the stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from corral.client import calls
from corral.client.aio.http import lines
from corral.client.held import CUT_S, LAST_WORDS_S, RECONNECT_S, Held
from corral.client.record import SILENCE_S, Record, read_batch
from corral.errors import CorralError, NotFound, TimedOut, Unavailable

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient


class AsyncHold:
    """Keeps a VM alive until it is closed. ``held`` is how the VM was last seen.

    A daemon that goes away is looked for, so that a sandbox outlives its restart.
    """

    def __init__(self, client: AsyncClient, vm: Record, launch: Record) -> None:
        self.held = Held(vm, launch)
        self._client = client
        self._turn = asyncio.Condition()
        self._lost: CorralError | None = None
        self._give_up_at: float | None = None
        """When to give up looking for a daemon that went away; none while it is there."""
        self._serving = asyncio.create_task(self._serve(), name=f"hold-{vm.id}")

    async def close(self) -> None:
        """Hold no longer: what is still there is then deleted by the daemon."""
        self._serving.cancel()
        await asyncio.wait([self._serving])

    async def wait_answer(self, timeout: float) -> Record:
        """The VM when its guest answers. Raises what went wrong instead; TimedOut naming what it waited for."""
        await self._until(lambda: self.held.answers or self._failure() is not None, timeout)
        failure = self._failure()
        if failure is not None:
            raise failure
        if not self.held.answers:
            raise self.held.late(timeout)
        return self.held.vm

    async def wait_end(self, timeout: float | None) -> CorralError | None:
        """Why the VM is over, if that is heard of within ``timeout`` seconds."""
        await self._until(lambda: self._failure() is not None, timeout)
        return self._failure()

    @asynccontextmanager
    async def explaining(self) -> AsyncIterator[None]:
        """Where the guest does not answer any more because its VM is over, the block's error becomes that, and why."""
        try:
            yield
        except CorralError as error:
            if error.exit_status != 5 or isinstance(error, TimedOut):
                raise  # not a silence, or one that the caller's own limit ended
            raise (await self.wait_end(LAST_WORDS_S)) or self.held.silence() or error from error

    @asynccontextmanager
    async def cutting(self, cut: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """For the length of the block: ``cut()`` is awaited when the VM is over."""

        async def watch() -> None:
            await self.wait_end(None)
            await asyncio.sleep(CUT_S)  # its last output may be on its way
            await cut()

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _until(self, test: Callable[[], bool], timeout: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._turn:
                await self._turn.wait_for(test)

    def _failure(self) -> CorralError | None:
        return self.held.failure() or self._lost

    async def _serve(self) -> None:
        while not self.held.deleted:
            try:
                await self._read()
            except NotFound:
                self.held.deleted = True
            except CorralError as error:
                self._give_up_at = self._give_up_at or time.monotonic() + RECONNECT_S
                if not isinstance(error, Unavailable) or time.monotonic() > self._give_up_at:
                    self._lost = error
            await self._tell()
            if self._lost is not None:
                return
            await asyncio.sleep(0.1)

    async def _read(self) -> None:
        """One connection, to its end."""
        call = calls.of_vm("hold", self.held.vm.id, self.held.vm.project)
        async with (
            self._client.http.stream(call, timeout=SILENCE_S) as pieces,
            aclosing(cast(Any, lines(pieces))) as rows,
        ):
            async for line in rows:
                self._give_up_at = None
                self.held.take(read_batch(line))
                await self._tell()
                if self.held.deleted:
                    return

    async def _tell(self) -> None:
        async with self._turn:
            self._turn.notify_all()
