"""One reader of a serial line: a bounded queue between the guest, who may flood, and a person, who may sleep."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

BACKLOG = 256 << 10
"""Bytes that wait for a reader; beyond that the oldest are dropped."""
GAP = b"\r\n[output dropped: not read in time]\r\n"


class SerialReader:
    """Implements :class:`corral.api.live.SerialSession`. ``send``: how input reaches the line; None: it has none."""

    def __init__(self, first: bytes, send: Callable[[bytes], Awaitable[None]] | None = None) -> None:
        self._chunks: deque[bytes] = deque([first] if first else [])
        self._size = len(first)
        self._send = send
        self._closed = False
        self._gap = False
        self._wake = asyncio.Event()
        if first:
            self._wake.set()

    def feed(self, data: bytes) -> None:
        """More output. Never waits: what does not fit pushes out what is oldest."""
        self._chunks.append(data)
        self._size += len(data)
        while self._size > BACKLOG and len(self._chunks) > 1:
            self._size -= len(self._chunks.popleft())
            self._gap = True
        self._wake.set()

    def end(self) -> None:
        """The line is closed; what waits can still be read."""
        self._closed = True
        self._wake.set()

    async def output(self) -> AsyncIterator[bytes]:
        """What came before, then live; ends with the line."""
        while True:
            while self._chunks:
                if self._gap:
                    self._gap = False
                    yield GAP
                data = self._chunks.popleft()
                self._size -= len(data)
                yield data
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()

    async def write(self, data: bytes) -> None:
        """Type. Raises Unavailable when the guest does not take it in time, or the line is closed."""
        if self._send is not None:
            await self._send(data)
