"""Removing the control groups of a machine that has ended."""

from __future__ import annotations

from corral.agent.ports import Groups
from corral.errors import Refused
from corral.runtime import Runtime

ROUNDS, PAUSE_S = 50, 0.02
"""The kernel lets go of a process a moment after it has ended: a second at most."""


async def disband(groups: Groups, id: str, rt: Runtime) -> None:
    """Have no groups of a machine. Raises Refused ``in-use`` when a process stays in them."""
    for last in range(ROUNDS, 0, -1):
        try:
            groups.remove(id)
            return
        except Refused:
            if last == 1:
                raise
            await rt.clock.sleep(PAUSE_S)
