"""From QEMU's answer to ``query-blockstats`` to :class:`~corral.engine.protocol.Stats`: a pure function.

Counted are the guest's requests at the device; what a qcow2 needs besides (its tables, its base) belongs to the nodes
below and is left out. QEMU counts nothing for cards in user mode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from corral.engine.protocol import CardStats, DriveStats, Machine, Stats

_DEVICE = re.compile(r"/machine/peripheral/disk-([^/]+)(?:/.*)?")
_FAILED = ("failed_rd_operations", "failed_wr_operations", "failed_flush_operations", "failed_unmap_operations")


def stats_of(machine: Machine, answer: Sequence[Mapping[str, Any]]) -> Stats:
    """``answer``: one entry per device that has a block node (firmware too: it is not the guest's drive)."""
    counted: dict[str, Mapping[str, int]] = {}
    for entry in answer:
        match = _DEVICE.fullmatch(str(entry.get("qdev", "")))
        if match is not None:
            counted[match[1]] = entry["stats"]
    return Stats(
        drives=tuple(_drive(drive.name, counted[drive.name]) for drive in machine.drives if drive.name in counted),
        cards=tuple(CardStats(name=card.name) for card in machine.cards),
    )


def _drive(name: str, counted: Mapping[str, int]) -> DriveStats:
    return DriveStats(
        name=name, read=counted["rd_bytes"], written=counted["wr_bytes"], reads=counted["rd_operations"],
        writes=counted["wr_operations"], flushes=counted["flush_operations"],
        failed=sum(counted[one] for one in _FAILED),
    )  # fmt: skip
