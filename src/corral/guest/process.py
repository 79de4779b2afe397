"""A program that runs behind corral-guest: its streams, with credit in both directions, and its end.

Its connection (:mod:`corral.guest.resident`) feeds it frames and sends for it. Memory is bounded by WINDOW and
STDIN_WINDOW: a guest that sends more than it was allowed breaks the protocol.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

from corral.errors import CorralError
from corral.guest.frames import (
    FRAME_COST,
    MAX_DATA,
    STDIN_WINDOW,
    WINDOW,
    Frame,
    Type,
    violation,
)
from corral.guest.protocol import Ended, Output

START_TIMEOUT_S = 30.0
"""A busy emulated guest may need seconds to load a program."""
KILL_TIMEOUT_S = 2.0
CROWDED = b"\x01"
"""Second byte of EXIT: the program wanted more processes than it may have."""


_TOO_OLD = "a string has a NUL in it"
"""What an agent says of a field that it does not know: there is never a NUL in what we send as text."""


class Link(Protocol):
    """What a process needs of its connection."""

    def send(self, type_: Type, channel: int, payload: bytes = b"") -> None: ...

    @property
    def lost(self) -> CorralError | None: ...


class ResidentProcess:
    """Implements :class:`corral.guest.protocol.Process`."""

    def __init__(self, link: Link, channel: int) -> None:
        self._link, self._channel = link, channel
        self._pieces: deque[Output] = deque()
        self._granted = WINDOW  # what the guest may still send
        self._owed = 0  # consumed, not yet given back
        self._credit = STDIN_WINDOW
        self._changed = asyncio.Event()  # output or the end has come
        self._writable = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._status: int | None = None
        self._crowded = False
        self._closed = False

    # What the connection calls.

    def handle(self, frame: Frame) -> bool:
        """Take a frame; True when it was the program's last. Raises ``guest`` at a violation."""
        if frame.type in (Type.STDOUT, Type.STDERR):
            self._take_output(frame)
        elif frame.type == Type.CREDIT:
            (count,) = struct.unpack("<I", frame.payload) if len(frame.payload) == 4 else (0,)
            if not 0 < count <= STDIN_WINDOW - self._credit:
                raise violation("credit that it does not owe")
            self._credit += count
            self._writable.set()
        elif frame.type == Type.STARTED and not self._started.done():
            self._started.set_result(None)
        elif frame.type == Type.FAILED and not self._started.done():
            status, reason = (frame.payload or b"\x7e")[0], frame.payload[1:512].decode(errors="replace")
            self._started.set_exception(_failure(reason, status))
            self._end(status)
        elif frame.type == Type.EXIT and len(frame.payload) in (1, 2):
            self._end(frame.payload[0], crowded=frame.payload[1:] == CROWDED)
        else:
            raise violation(f"frame type {frame.type} out of order")
        return self._status is not None

    def fail(self, error: CorralError) -> None:
        """The connection is gone: whoever waits for this program hears it."""
        if not self._started.done():
            self._started.set_exception(error)
        self._changed.set()
        self._writable.set()

    async def started(self) -> None:
        """Wait until the program runs; raises what kept it from running."""
        await self._started

    def _take_output(self, frame: Frame) -> None:
        cost = len(frame.payload) + FRAME_COST
        if cost > self._granted:
            raise violation("more output than it has credit for")
        self._granted -= cost
        if self._closed:
            return
        self._pieces.append(Output(stream=1 if frame.type == Type.STDOUT else 2, data=frame.payload))
        self._changed.set()

    def _end(self, status: int, *, crowded: bool = False) -> None:
        self._status, self._crowded = status, crowded
        if not self._started.done():
            self._started.set_result(None)
        self._changed.set()
        self._writable.set()

    # corral.guest.protocol.Process

    async def output(self) -> AsyncIterator[Output | Ended]:
        """Pieces in order, then :class:`Ended`. One reader at a time."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                yield piece
                self._give_back(len(piece.data) + FRAME_COST)
            if self._status is not None:
                yield Ended(status=self._status, crowded=self._crowded)
                return
            if self._link.lost:
                raise self._link.lost
            self._changed.clear()
            await self._changed.wait()

    def _give_back(self, cost: int) -> None:
        self._owed += cost
        if self._owed >= WINDOW // 4 and self._status is None and not self._closed and not self._link.lost:
            self._granted += self._owed
            self._link.send(Type.CREDIT, self._channel, struct.pack("<I", self._owed))
            self._owed = 0

    async def write(self, data: bytes) -> None:
        """To its stdin, waiting while the guest does not read. What comes after the program's end goes nowhere."""
        view = memoryview(data)
        while view and self._running():
            if self._credit == 0:
                self._writable.clear()
                await self._writable.wait()
                continue
            count = min(len(view), self._credit, MAX_DATA)
            self._credit -= count
            self._link.send(Type.STDIN, self._channel, bytes(view[:count]))
            view = view[count:]

    async def eof(self) -> None:
        if self._running():
            self._link.send(Type.EOF, self._channel)

    async def signal(self, number: int) -> None:
        if self._running():
            self._link.send(Type.SIGNAL, self._channel, bytes([number]))

    async def resize(self, rows: int, columns: int) -> None:
        if self._running():
            self._link.send(Type.RESIZE, self._channel, struct.pack("<HH", rows & 0xFFFF, columns & 0xFFFF))

    async def close(self) -> None:
        """Kill the program if it still runs, and wait a moment for the guest's word that it is dead."""
        if self._closed:
            return
        self._closed = True
        self._pieces.clear()
        if self._status is not None or self._link.lost:
            return
        self._link.send(Type.CLOSE, self._channel)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                while self._status is None and not self._link.lost:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return  # the order stands: a guest that wakes up again carries it out

    def _running(self) -> bool:
        if self._link.lost:
            raise self._link.lost
        return self._status is None and not self._closed


def _failure(reason: str, status: int) -> CorralError:
    """Why a program was not started, in the guest's words where those mean something."""
    if reason == _TOO_OLD:
        text = "the corral-guest in this VM is older than this Corral, and does not know all that is asked of it"
        hint = "have its image built again (corral image list says which are outdated), or import a newer one"
        return CorralError(text, code="guest", hint=hint)
    return CorralError(reason or "the program cannot be started", code="guest", status=status)
