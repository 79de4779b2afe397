"""The wire between Corral and corral-guest: frames and fields, encoding and decoding. Pure; no I/O, no clock.

The other half is guest-agent/src/agent.h, where the protocol is described. In short: a frame is a 12 byte header
(u32 length, u32 channel, u8 type, "CG1") and a payload of at most 64 KiB; MARK may stand between two frames and is
what both sides look for after they lost the boundary. Next: :mod:`corral.guest.resident`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from corral.errors import CorralError

PROTOCOL = 1
MARK = b"\xffCORRAL\xfeRESYNC\xfd\n"
MAGIC = b"CG1"
HEADER = struct.Struct("<IIB3s")
FIELD = struct.Struct("<BI")
MAX_PAYLOAD = 65536
MAX_DATA = 32768
"""Bytes of a program's input in one frame."""
WINDOW = 262144
"""Cost of a program's output that may be on its way, unread."""
STDIN_WINDOW = 131072
"""Bytes of a program's input that may be on their way, unread."""
FRAME_COST = 64
"""What an output frame costs besides its payload: many small pieces take memory too."""
NONCE_SIZE = 16
MAX_GREETING = 256
"""Payload of WELCOME and ANNOUNCE at most: the only frames to look for while hunting."""
MAX_HUNT = 8 << 20
"""Bytes that may be thrown away in search of MARK: more than any leftovers of an earlier connection."""


class Type(IntEnum):
    """What a frame is. Requests are answered by REPLY or REFUSED on the same channel number."""

    HELLO = 0x01
    WELCOME = 0x02
    ANNOUNCE = 0x03
    VIOLATION = 0x04
    PING = 0x10
    INFO = 0x11
    IDENTITY = 0x12
    SHUTDOWN = 0x13
    REPLY = 0x18
    REFUSED = 0x19
    EXEC = 0x20
    STARTED = 0x21
    FAILED = 0x22
    STDIN = 0x23
    EOF = 0x24
    STDOUT = 0x25
    STDERR = 0x26
    EXIT = 0x27
    SIGNAL = 0x28
    RESIZE = 0x29
    CLOSE = 0x2A
    CREDIT = 0x2B


class Field(IntEnum):
    """The tag of a field in a structured payload."""

    ARG = 1
    ENV = 2
    CWD = 3
    USER = 4
    TTY = 5
    PROCESSES = 6
    VERSION = 16
    HOSTNAME = 17
    OS = 18
    KERNEL = 19
    ADDRESS = 20
    BOOT_ID = 21
    READY = 22
    TIME = 32
    SEED = 33
    MACHINE_ID = 34
    HOST_KEY = 35
    HOST_KEY_PUBLIC = 36
    AUTHORIZED_KEYS = 37
    MAC = 38
    GATEWAY = 39
    DNS = 40


class Frame(NamedTuple):
    """One decoded frame."""

    type: int
    channel: int
    payload: bytes


def violation(what: str) -> CorralError:
    """The error for a guest that does not keep to the protocol."""
    return CorralError(f"the guest's agent broke the protocol: {what}", code="guest")


def encode(type_: Type, channel: int = 0, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    assert len(payload) <= MAX_PAYLOAD, "a frame takes at most 64 KiB"
    return HEADER.pack(len(payload), channel, type_, MAGIC) + payload


def encode_fields(fields: Iterable[tuple[Field, bytes]]) -> bytes:
    """A structured payload."""
    return b"".join(FIELD.pack(tag, len(data)) + data for tag, data in fields)


def decode_fields(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a structured payload; unknown tags too. Raises ``guest`` when it is malformed."""
    at = 0
    while at < len(payload):
        if at + FIELD.size > len(payload):
            raise violation("a field is cut off")
        tag, length = FIELD.unpack_from(payload, at)
        at += FIELD.size
        if at + length > len(payload):
            raise violation("a field is longer than its frame")
        yield tag, payload[at : at + length]
        at += length


class Decoder:
    """Bytes in, frames out. Never holds more than one frame and one fed piece.

    Begins *hunting*: everything before the first MARK is thrown away, and so it is again after :meth:`hunt`. While it
    hunts it goes on looking after a MARK that no frame follows, so leftovers that happen to contain one do no harm.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._hunting = True
        self._dropped = 0

    def hunt(self) -> None:
        """The boundary is lost: drop what comes before the next MARK."""
        self._hunting, self._dropped = True, 0

    def settle(self) -> None:
        """The other side has answered: from here on anything that is not a frame is a violation."""
        self._hunting = False

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def __iter__(self) -> Iterator[Frame]:
        """The frames that are complete. Raises ``guest`` at what is none (not while hunting, up to MAX_HUNT)."""
        while frame := self._next():
            yield frame

    def _next(self) -> Frame | None:
        buffer = self._buffer
        while True:
            if self._hunting and not self._find_mark():
                return None
            marked = buffer.startswith(MARK)
            at = len(MARK) if marked else 0
            if not marked and buffer and MARK.startswith(buffer[: len(MARK)]):
                return None  # perhaps a MARK whose end is yet to come
            if len(buffer) < at + HEADER.size:
                return None
            length, channel, type_, magic = HEADER.unpack_from(buffer, at)
            if magic != MAGIC or length > (MAX_GREETING if self._hunting else MAX_PAYLOAD):
                if not self._hunting:
                    raise violation("not a frame")
                del buffer[:1]
                self._dropped += 1
                continue
            end = at + HEADER.size + length
            if len(buffer) < end:
                return None
            frame = Frame(type_, channel, bytes(memoryview(buffer)[at + HEADER.size : end]))
            # While hunting the frame may be forged by leftovers: go on right behind its MARK.
            del buffer[: at if self._hunting else end]
            return frame

    def _find_mark(self) -> bool:
        """Throw away what comes before MARK; whether the buffer begins with one now."""
        buffer = self._buffer
        at = buffer.find(MARK)
        drop = at if at >= 0 else max(0, len(buffer) - len(MARK) + 1)
        del buffer[:drop]
        self._dropped += drop
        if self._dropped > MAX_HUNT:
            raise violation("a flood of bytes that are no frames")
        return at >= 0
