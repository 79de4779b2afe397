"""Background tasks that are never lost: a crash is logged and restarted with a delay, shutdown waits for all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from corral.runtime.clock import Clock

log = structlog.get_logger("supervisor")


class Supervisor:
    """Owns long-running tasks. ``start`` keeps one alive for ever; ``spawn`` runs one once. ``close`` ends all."""

    def __init__(self, clock: Clock, *, restart_after: float = 1.0) -> None:
        self._clock, self._restart_after = clock, restart_after
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run ``run()`` and run it again whenever it ends or raises."""
        return self._keep(name, self._forever(name, run))

    def spawn(self, name: str, run: Awaitable[None]) -> asyncio.Task[None]:
        """Run once; an exception is logged."""
        return self._keep(name, self._once(name, run))

    async def close(self) -> None:
        """Cancel everything and wait until it is gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _keep(self, name: str, work: Awaitable[None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _forever(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await run()
            except Exception:
                log.exception("background task failed", task=name)
            await self._clock.sleep(self._restart_after)

    async def _once(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:
            log.exception("background task failed", task=name)
