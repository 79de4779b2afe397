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
    # Write the 32 KiB chunks 1 to 1023 through the firmware (int 13h, function 43h), each filled with its number; then
    # say W on the serial port, or E when a write fails.
    "writer": (
        "31c0 8ed8 8ed0 bc007c 88d6 b80010 8ec0 66bd01000000 31ff 6689e8 b90020 fc 66f3ab 6689e8 66c1e006 66a35b7c "
        "be537c b80043 52 88f2 cd13 5a 720f 6645 6681fd00040000 72d0 b057 eb02 b045 baf803 ee f4 ebfd "
        "1000 4000 0000 0010 0000000000000000"
    ),
    "talkative": "ba f8 03 b0 68 ee b0 69 ee b0 0a ee " + _HALT,  # "hi\n" on the serial port
}


WRITER_CHUNK, WRITER_CHUNKS = 32 << 10, 1023
"""What the guest ``writer`` writes: bytes of a chunk, and how many."""


def disk(path: Path, guest: str) -> Path:
    """A raw disk of 1 MiB (the writer's: 32 MiB) that boots the guest."""
    sector = bytes.fromhex(SECTORS[guest])
    assert len(sector) <= 510
    with path.open("wb") as file:
        file.write(sector.ljust(510, b"\0") + b"\x55\xaa")
        file.truncate((32 << 20) if guest == "writer" else (1 << 20))
    return path
