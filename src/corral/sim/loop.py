"""An asyncio loop in virtual time: when nothing is ready, time jumps to the next timer. An hour takes milliseconds.

Everything that runs on it must wait only through the loop: threads and sockets are refused, because their timing could
not be repeated. When nothing is ready and no timer is set, nothing will ever happen again: a deadlock, and an error.
Garbage collection is off while it runs, since a collected generator would be closed at a moment nobody chose.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

from corral.errors import Bug

T = TypeVar("T")

RESOLUTION = 1e-6
"""Timers this near to each other fire together; hides the rounding of sums of floats."""

MOST_ROUNDS = 3_000_000
"""Rounds of the loop in one run. A scenario needs a few ten thousand; more is a busy loop that never lets time pass."""

EPOCH = 1_700_000_000.0
"""Wall time when a simulation begins."""


class Deadlock(Bug):
    """Nothing is ready and nothing is scheduled: every task waits for another."""


class _Selector(selectors.BaseSelector):
    """Selects nothing; waiting moves the loop's time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds = 0
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self._keys:  # the first is the loop's own wake-up pipe
            raise Bug("a simulated program may not wait for a file or a socket")
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, number, events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.rounds += 1
        if self.rounds > MOST_ROUNDS:
            raise Bug(f"the loop went round {MOST_ROUNDS} times: something spins without letting time pass")
        if timeout is None:
            raise Deadlock(f"at {self.now:.3f} s nothing is ready and nothing is scheduled: a deadlock")
        if timeout > 0:
            self.now += timeout
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time begins at 0 and passes only while everybody waits."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._clock_resolution = RESOLUTION

    def time(self) -> float:
        return self._virtual.now

    def end(self) -> None:
        """End what a run that failed has left behind, so that it does not complain when it is collected."""
        self._virtual.rounds = 0
        left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        if left:
            self.run_until_complete(asyncio.wait(left, timeout=60.0))
        self.run_until_complete(self.shutdown_asyncgens())

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> NoReturn:  # type: ignore[override]
        raise Bug("a simulated program may not use threads")


class SimClock:
    """The clock of a simulated host. ``wall_offset`` is what its wall clock was set wrong by, seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.wall_offset = 0.0

    def now(self) -> float:
        return EPOCH + self.wall_offset + self._loop.time()

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def simulate(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run ``main(loop)`` to its end in virtual time. Raises what it raises, or :class:`Deadlock`."""
    loop = VirtualLoop()
    collecting = gc.isenabled()
    gc.disable()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop))
    finally:
        loop.end()
        asyncio.set_event_loop(None)
        loop.close()
        if collecting:
            gc.enable()
