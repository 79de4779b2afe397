"""Guests of a few bytes: boot sectors on a raw disk, so that tests of real QEMU need no image."""

from __future__ import annotations

from pathlib import Path

_HALT = "f4 eb fd"  # hlt; jmp to it
_OFF = "ba 04 06 b8 00 20 ef"  # ACPI: write SLP_EN to PM1a control (port 0x604 on q35)

SECTORS = {
    "idle": _HALT,
    "poweroff": f"{_OFF} {_HALT}",
    "panic": f"ba 05 05 b0 01 ee {_HALT}",  # pvpanic: port 0x505
    "reboot-once": f"b0 0e e6 70 e4 71 a8 40 75 0c b0 0e e6 70 b0 40 e6 71 b0 fe e6 64 {_HALT} {_HALT}",
    # Enable the power button's status bit (port 0x602), wait for it (0x600), power off.
    "obedient": f"ba 02 06 b8 00 01 ef ba 00 06 ed f6 c4 01 74 fa {_OFF} {_HALT}",
    "talkative": "ba f8 03 b0 68 ee b0 69 ee b0 0a ee " + _HALT,  # "hi\n" on the serial port
}


def disk(path: Path, guest: str) -> Path:
    """A raw disk of 1 MiB that boots the guest."""
    sector = bytes.fromhex(SECTORS[guest])
    assert len(sector) <= 510
    path.write_bytes(sector.ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512))
    return path
