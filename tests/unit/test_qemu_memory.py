"""Reading what QEMU says about a balloon: what the guest told, when, and what it never told."""

from __future__ import annotations

from typing import Any

from corral.engine.protocol import Machine, MemorySight
from corral.engine.qemu.memory import sight_of

SILENT = (1 << 64) - 1
MACHINE = Machine(id="", name="web", memory=256 << 20)


def said(at: int, **figures: int) -> dict[str, Any]:
    names = ("available", "free", "total", "disk-caches", "swap-in")
    return {"last-update": at, "stats": {f"stat-{n}-memory": SILENT for n in names} | figures}


def test_what_a_guest_never_said_is_none_and_not_an_enormous_number() -> None:
    sight = sight_of(MACHINE, {"actual": 256 << 20}, said(0))
    assert sight == MemorySight(size=256 << 20, granted=256 << 20)


def test_what_it_said_comes_with_its_time() -> None:
    figures = {"stat-available-memory": 100 << 20, "stat-free-memory": 60 << 20, "stat-total-memory": 180 << 20}
    sight = sight_of(MACHINE, {"actual": 200 << 20}, said(1700000000, **figures))
    assert (sight.granted, sight.available, sight.free, sight.total) == (200 << 20, 100 << 20, 60 << 20, 180 << 20)
    assert sight.at == 1700000000.0


def test_of_a_machine_whose_record_was_lost_the_balloon_tells_the_size() -> None:
    assert sight_of(Machine(id="", name="", memory=0), {"actual": 1 << 30}, said(0)).size == 1 << 30
