"""Exec and console for asyncio, over websockets. Imported only when one is opened."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, WebSocketException

from corral.client import frames
from corral.client.address import Address
from corral.client.calls import Call
from corral.client.record import KILLED, Printed, Result
from corral.errors import CorralError, TimedOut, Unavailable

MAX_QUEUE = 16
"""Messages read ahead: beyond it the socket is not read, and the guest's program waits."""


async def _open(address: Address, call: Call, token: str, timeout: float) -> ClientConnection:
    options: dict[str, Any] = {
        "compression": None, "max_size": None, "max_queue": MAX_QUEUE, "open_timeout": timeout, "close_timeout": 2,
        "ping_interval": None, "additional_headers": {"Authorization": f"Bearer {token}"} if token else {},
    }  # fmt: skip
    try:
        if address.socket is None:
            scheme = "wss" if address.secure else "ws"
            return await connect(f"{scheme}://{address.authority}{call.path}", proxy=None, **options)
        name, directory = address.connectable()
        try:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                line.connect(name)
                line.setblocking(False)
            except OSError:
                line.close()
                raise
        finally:
            if directory is not None:
                os.close(directory)
        return await unix_connect(uri=f"ws://localhost{call.path}", sock=line, **options)
    except TimeoutError as error:
        raise TimedOut(f"no connection to {address.text} within {timeout:g} s") from error
    except InvalidHandshake as error:
        body = getattr(getattr(error, "response", None), "body", b"")
        raise (frames.problem(body) if body else Unavailable(f"{address.text} refused the socket: {error}")) from error
    except (OSError, WebSocketException) as error:
        raise Unavailable(f"no daemon answers at {address.text}: {error}") from error


class _Socket:
    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    async def close(self) -> None:
        await self._connection.close()

    async def _send(self, message: str | bytes) -> None:
        try:
            await self._connection.send(message)
        except ConnectionClosed as error:
            raise Unavailable("the connection to the daemon was lost") from error


class AsyncExec(_Socket):
    """A program in a guest. Iterate over its output; ``status`` is set when that ends. Closing it kills the program."""

    status: int | None = None
    crowded = False
    """It wanted more processes than it may have."""

    def __init__(self, connection: ClientConnection) -> None:
        super().__init__(connection)
        self._turn = asyncio.Event()
        self._room = frames.WINDOW
        self._over = False

    @classmethod
    async def open(cls, address: Address, call: Call, command: str, *, token: str, timeout: float) -> AsyncExec:
        """Start it."""
        program = cls(await _open(address, call, token, timeout))
        await program._send(command)
        return program

    async def __aiter__(self) -> AsyncIterator[frames.Output]:
        while (item := await self.read()) is not None:
            yield item

    async def read(self) -> frames.Output | None:
        """The next piece of output, None at the end. Raises what went wrong."""
        while self.status is None:
            try:
                item = frames.parse(await self._connection.recv())
            except ConnectionClosed as error:
                self._account(over=True)
                raise Unavailable("the connection to the daemon was lost") from error
            except CorralError:
                self._account(over=True)
                raise
            if isinstance(item, frames.Output):
                return item
            if isinstance(item, frames.Ended):
                self.status, self.crowded = item.status, item.crowded
                self._account(over=True)
            else:
                self._account(taken=item.size)
        return None

    def _account(self, *, taken: int = 0, over: bool = False) -> None:
        self._room += taken
        self._over = self._over or over
        self._turn.set()

    async def write(self, data: bytes) -> None:
        """To its stdin; waits while the guest does not read (which is told by reading: have that go on meanwhile).

        Raises Unavailable when the program has ended.
        """
        view = memoryview(data)
        while view:
            while self._room <= 0 and not self._over:
                self._turn.clear()
                await self._turn.wait()
            if self._over:
                raise Unavailable("the program has ended")
            piece = view[: min(self._room, frames.CHUNK)]
            self._room -= len(piece)
            await self._send(frames.stdin(bytes(piece)))
            view = view[len(piece) :]

    async def eof(self) -> None:
        """Close its stdin. A program that has ended meanwhile needs no end of input: reading tells how it ended."""
        with suppress(Unavailable):
            await self._send(frames.eof())

    async def signal(self, number: int) -> None:
        await self._send(frames.signal(number))

    async def resize(self, rows: int, columns: int) -> None:
        await self._send(frames.resize(rows, columns))

    async def collect(self, stdin: bytes = b"", timeout: float | None = None, max_output: int | None = None) -> Result:
        """Feed it, read it to its end.

        ``max_output``: bytes that it may print; the caller's close then kills it, and the result says so. Raises
        TimedOut (the caller's close then kills it) after ``timeout`` seconds.
        """
        printed = Printed(max_output)
        feeder = asyncio.ensure_future(self._feed(stdin))
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                async for item in self:
                    if not printed.take(item):
                        return printed.result(KILLED, "output")
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimedOut(f"the program took longer than {timeout:g} s") from error
        finally:
            feeder.cancel()
            with suppress(asyncio.CancelledError):
                await feeder
        assert self.status is not None
        return printed.result(self.status, "processes" if self.crowded else "")

    async def _feed(self, data: bytes) -> None:
        # A lost connection is told by the reader; a program may also end without reading its stdin.
        with suppress(CorralError):
            await self.write(data)
            await self.eof()


class AsyncConsole(_Socket):
    """A VM's serial console. Bytes both ways; iterate over what the guest prints."""

    @classmethod
    async def open(cls, address: Address, call: Call, *, token: str, timeout: float) -> AsyncConsole:
        """Connect."""
        return cls(await _open(address, call, token, timeout))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def read(self) -> bytes:
        """What the guest printed; empty when the line has closed."""
        try:
            message = await self._connection.recv()
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == 1000:
                return b""
            raise Unavailable("the connection to the daemon was lost") from error
        if isinstance(message, str):
            raise frames.problem(message)
        return message

    async def write(self, data: bytes) -> None:
        await self._send(data)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the guest the terminal's size, where its agent can take it."""
        await self._send(frames.console_size(rows, columns))
