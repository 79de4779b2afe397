"""Named places where a kill must be survivable.

Code that changes the world calls ``await rt.faults.at("start.spawned")`` between its steps. In production this does
nothing. The kill tests enumerate the names and end the daemon with SIGKILL at each (``CORRAL_KILL_AT=name[:nth]``);
the simulator crashes, delays or errors there. One list of points serves both, so a new step is tested by existing.
"""

from __future__ import annotations

import os
import signal
from typing import Protocol


class FaultPoints(Protocol):
    """What happens at a named point."""

    async def at(self, point: str) -> None:
        """Pass the point, or do not."""
        ...


class NoFaults:
    """Production: every point is passed."""

    async def at(self, point: str) -> None:
        return


class KillAt:
    """End this process, as a power cut would, the ``nth`` time that ``point`` is reached."""

    def __init__(self, point: str, nth: int = 1) -> None:
        self.point, self.left = point, nth

    @classmethod
    def from_environment(cls) -> FaultPoints:
        """``CORRAL_KILL_AT=point`` or ``point:3``; unset: no faults."""
        text = os.environ.get("CORRAL_KILL_AT", "")
        if not text:
            return NoFaults()
        point, _, nth = text.partition(":")
        return cls(point, int(nth or 1))

    async def at(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
