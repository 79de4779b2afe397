"""From QEMU's answers about the balloon to :class:`~corral.engine.protocol.MemorySight`: a pure function.

The guest's figures come from its virtio driver, when QEMU's timer asks for them (``guest-stats-polling-interval``).
``last-update`` says when it last did: the figures of a guest that has been reset or hangs are old, not absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.engine.protocol import Machine, MemorySight

_BALLOON = "/machine/peripheral/balloon"
GUEST_STATS: Mapping[str, object] = {"path": _BALLOON, "property": "guest-stats"}
POLLING: Mapping[str, object] = {"path": _BALLOON, "property": "guest-stats-polling-interval"}
_SILENT = 1 << 63
"""QEMU fills what a guest has not said with all ones."""


def sight_of(machine: Machine, state: Mapping[str, Any], said: Mapping[str, Any]) -> MemorySight:
    """``state``: the answer to ``query-balloon``; ``said``: the property ``guest-stats``."""
    stats = said["stats"]

    def figure(name: str) -> int | None:
        value = stats.get(f"stat-{name}-memory")
        return None if value is None or not 0 <= value < _SILENT else int(value)

    granted = int(state["actual"])
    return MemorySight(
        size=machine.memory or granted, granted=granted, available=figure("available"), free=figure("free"),
        total=figure("total"), at=float(said["last-update"]) or None,
    )  # fmt: skip
