"""The keyed work queue of level-triggered controllers.

A key is handled by one worker at a time; adding a key that waits is a no-op, adding one that is being handled makes it
run once more afterwards. So a handler may always read the newest state and need not know what changed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

from corral.runtime.clock import Clock


class KeyedQueue:
    """``workers`` handlers over keys. A handler that raises gets its key again after a growing delay.

    Args:
        handle: called with a key; returns seconds after which to be called again, or None.
        on_error: called with (key, exception) for every failure; must not raise.
        retry: first and longest delay after failures, seconds.
    """

    def __init__(
        self,
        clock: Clock,
        handle: Callable[[str], Awaitable[float | None]],
        *,
        workers: int = 4,
        on_error: Callable[[str, Exception], None],
        retry: tuple[float, float] = (0.5, 30.0),
    ) -> None:
        self._clock, self._handle, self._workers = clock, handle, workers
        self._on_error, self._retry = on_error, retry
        self._ready: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, bool] = {}  # key → run again when done
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        self._failures: dict[str, int] = {}
        self._idle: deque[asyncio.Future[None]] = deque()  # one for each worker that waits

    def add(self, key: str, after: float = 0.0) -> None:
        """Have ``key`` handled, now or after some seconds (an earlier time that is already set wins)."""
        if after > 0:
            loop = asyncio.get_running_loop()
            due = loop.time() + after
            if key in self._timers:
                if self._timers[key][0] <= due:
                    return
                self._timers.pop(key)[1].cancel()
            self._timers[key] = (due, loop.call_at(due, self._fire, key))
        elif key in self._running:
            self._running[key] = True
        else:
            self._ready[key] = None
            self._wake_one()

    def _fire(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def idle(self) -> bool:
        """Nothing is waiting or being handled (timers do not count)."""
        return not self._ready and not self._running

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._workers):
                    group.create_task(self._worker(), name=f"queue-worker-{number}")
        finally:
            for _, timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    async def _woken(self) -> None:
        """Wait until there may be something to do."""
        turn = asyncio.get_running_loop().create_future()
        self._idle.append(turn)
        try:
            await turn
        finally:
            if turn in self._idle:  # cancelled before its turn came
                self._idle.remove(turn)

    def _wake_one(self) -> None:
        """One key wakes one worker: waking all of them for each key would cost more than the work."""
        while self._idle:
            turn = self._idle.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    async def _worker(self) -> None:
        while True:
            while not self._ready:
                await self._woken()
            key, _ = self._ready.popitem(last=False)
            self._running[key] = False
            again: float | None = None
            try:
                again = await self._handle(key)
                self._failures.pop(key, None)
            except Exception as error:  # noqa: BLE001 - reported, and the key comes again: a bad key must not stop others
                self._on_error(key, error)
                first, longest = self._retry
                count = self._failures[key] = self._failures.get(key, 0) + 1
                again = min(longest, first * 2 ** min(count - 1, 16))
            finally:
                rerun = self._running.pop(key)
            if rerun:
                self.add(key)
            elif again is not None:
                self.add(key, max(again, 1e-6))
