"""Programs of a few bytes for x86_64 guests, so that a guest without tools can be made to misbehave."""

from __future__ import annotations

import struct

_SPIN = bytes.fromhex(
    "31ff"  # xor edi, edi: this process
    "be01000000"  # mov esi, SCHED_FIFO
    "488d1509000000"  # lea rdx, [priority]
    "b890000000"  # mov eax, sched_setscheduler
    "0f05"  # syscall
    "ebfe"  # jmp to itself
    "63000000"  # priority: 99
)


def spin() -> bytes:
    """A static program that keeps one CPU for itself for ever: nothing of lower real-time priority runs on it again."""
    return _static(_SPIN)


def _static(code: bytes) -> bytes:
    """The smallest ELF file around the code: one segment, loaded and entered where the code begins."""
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    elf = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return elf + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code
