"""Time. Two clocks that must not be mixed: wall time for people, monotonic time for every difference."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Where code gets the time from."""

    def now(self) -> float:
        """Wall time, seconds since 1970 (UTC). For records and people; may jump. Never subtract two of them."""
        ...

    def monotonic(self) -> float:
        """Seconds on this process's own clock. Never jumps; only differences mean anything."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait. Under simulation this is what moves time."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
