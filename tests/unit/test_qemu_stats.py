"""Reading QEMU's counters: whose they are, and what counts as a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corral.engine.protocol import Card, CardStats, Drive, DriveStats, Machine
from corral.engine.qemu.stats import stats_of


def entry(device: str, **counted: int) -> dict[str, Any]:
    names = (
        "rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations", "failed_rd_operations",
        "failed_wr_operations", "failed_flush_operations", "failed_unmap_operations",
    )  # fmt: skip
    return {"qdev": device, "stats": dict.fromkeys(names, 0) | counted}


def machine(*drives: str) -> Machine:
    cards = (Card(name="nic0", mac="52:54:00:12:34:56", hostname="web"),)
    made = tuple(Drive(name=name, path=Path(f"/v/{name}"), format="raw") for name in drives)
    return Machine(id="", name="web", memory=64 << 20, drives=made, cards=cards)


def test_counters_are_told_by_device_in_the_machines_order() -> None:
    answer = [
        entry("/machine/peripheral/disk-data", wr_bytes=4096, wr_operations=1, flush_operations=2),
        entry("/machine/peripheral/disk-root/virtio-backend", rd_bytes=1024, rd_operations=2),
    ]
    assert stats_of(machine("root", "data"), answer).drives == (
        DriveStats(name="root", read=1024, reads=2),
        DriveStats(name="data", written=4096, writes=1, flushes=2),
    )


def test_the_firmwares_flash_is_no_drive_of_the_guests() -> None:
    flash = entry("/machine/q35.flash0", rd_bytes=77)
    nameless = {"node-name": "pflash-vars", "stats": {}}
    assert stats_of(machine("root"), [flash, nameless]).drives == ()


def test_every_kind_of_failure_counts_and_requests_that_the_guest_got_wrong_do_not() -> None:
    failed = entry(
        "/machine/peripheral/disk-root/virtio-backend", failed_rd_operations=1, failed_wr_operations=2,
        failed_flush_operations=4, failed_unmap_operations=8, invalid_rd_operations=100,
    )  # fmt: skip
    assert stats_of(machine("root"), [failed]).drives[0].failed == 15


def test_cards_in_user_mode_are_named_and_not_counted() -> None:
    assert stats_of(machine(), []).cards == (CardStats(name="nic0", received=None, sent=None),)
