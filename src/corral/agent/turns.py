"""Turns at starting: so many VMs boot at once, the others wait in order. A turn that takes too long is given on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Turns:
    """``limit`` holders at a time, first come, first served.

    Args:
        ready: called with the id of a waiting VM when it may ask again.
    """

    def __init__(self, limit: int, ready: Callable[[str], None]) -> None:
        self.limit, self._ready = limit, ready
        self._holding: dict[str, asyncio.TimerHandle] = {}
        self._waiting: dict[str, None] = {}

    def take(self, id: str, cap_s: float) -> bool:
        """Have a turn for at most ``cap_s`` seconds, or wait for one: False, and ``ready`` is called later."""
        if id in self._holding:
            return True
        self._waiting.setdefault(id)
        free = self.limit - len(self._holding)
        if id not in list(self._waiting)[: max(0, free)]:
            return False
        del self._waiting[id]
        self._holding[id] = asyncio.get_running_loop().call_later(cap_s, self.give, id)
        return True

    def give(self, id: str) -> None:
        """The VM is up, or no longer wants to start."""
        self._waiting.pop(id, None)
        timer = self._holding.pop(id, None)
        if timer is None:
            return
        timer.cancel()
        for waiting in list(self._waiting)[: max(0, self.limit - len(self._holding))]:
            self._ready(waiting)

    @property
    def starting(self) -> int:
        return len(self._holding)

    def close(self) -> None:
        """Let go of all timers."""
        for timer in self._holding.values():
            timer.cancel()
        self._holding.clear()
        self._waiting.clear()
