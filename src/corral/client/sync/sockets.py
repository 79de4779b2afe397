"""Exec and console for synchronous callers, over websockets. Imported only when one is opened."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, WebSocketException
from websockets.sync.client import ClientConnection, connect, unix_connect

from corral.client import frames
from corral.client.address import Address
from corral.client.calls import Call
from corral.client.record import KILLED, Printed, Result
from corral.errors import CorralError, TimedOut, Unavailable

MAX_QUEUE = 16
"""Messages read ahead: beyond it the socket is not read, and the guest's program waits."""


def _open(address: Address, call: Call, token: str, timeout: float) -> ClientConnection:
    options: dict[str, Any] = {
        "compression": None, "max_size": None, "max_queue": MAX_QUEUE, "open_timeout": timeout, "close_timeout": 2,
        "ping_interval": None, "proxy": None,
        "additional_headers": {"Authorization": f"Bearer {token}"} if token else {},
    }  # fmt: skip
    try:
        if address.socket is None:
            return _typed(connect(f"{'wss' if address.secure else 'ws'}://{address.authority}{call.path}", **options))
        options.pop("proxy")
        name, directory = address.connectable()
        try:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                line.connect(name)
            except OSError:
                line.close()
                raise
        finally:
            if directory is not None:
                os.close(directory)
        return _typed(unix_connect(uri=f"ws://localhost{call.path}", sock=line, **options))
    except TimeoutError as error:
        raise TimedOut(f"no connection to {address.text} within {timeout:g} s") from error
    except InvalidHandshake as error:
        body = getattr(getattr(error, "response", None), "body", b"")
        raise (frames.problem(body) if body else Unavailable(f"{address.text} refused the socket: {error}")) from error
    except (OSError, WebSocketException) as error:
        raise Unavailable(f"no daemon answers at {address.text}: {error}") from error


def _typed(connection: Any) -> ClientConnection:
    # Entered at once, as recent versions of the library want it; whoever holds it closes it.
    opened = connection.__enter__()
    assert isinstance(opened, ClientConnection)
    return opened


class _Socket:
    """What both have: open for a block, closed after it."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection.close()

    def _send(self, message: str | bytes) -> None:
        try:
            self._connection.send(message)
        except ConnectionClosed as error:
            raise Unavailable("the connection to the daemon was lost") from error

    def _receive(self, timeout: float | None = None) -> str | bytes:
        try:
            return self._connection.recv(timeout)
        except TimeoutError as error:
            raise TimedOut(f"nothing came for {timeout:g} s") from error
        except ConnectionClosed as error:
            raise Unavailable("the connection to the daemon was lost") from error


class Exec(_Socket):
    """A program in a guest. Iterate over its output; ``status`` is set when that ends. Closing it kills the program.

    Reading may happen in one thread and writing in another; what writes more than :data:`frames.WINDOW` needs that.
    """

    status: int | None = None
    crowded = False
    """It wanted more processes than it may have."""
    _room = frames.WINDOW
    _over = False

    def __init__(self, address: Address, call: Call, command: str, *, token: str = "", timeout: float = 60.0) -> None:
        super().__init__(_open(address, call, token, timeout))
        self._turn = threading.Condition()
        self._send(command)

    def __enter__(self) -> Exec:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[frames.Output]:
        while (item := self.read()) is not None:
            yield item

    def read(self, timeout: float | None = None) -> frames.Output | None:
        """The next piece of output, None at the end. Raises what went wrong, TimedOut after ``timeout`` of silence."""
        while self.status is None:
            try:
                item = frames.parse(self._receive(timeout))
            except TimedOut:
                raise
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

    def close(self) -> None:
        self._account(over=True)
        super().close()

    def _account(self, *, taken: int = 0, over: bool = False) -> None:
        with self._turn:
            self._room += taken
            self._over = self._over or over
            self._turn.notify_all()

    def write(self, data: bytes) -> None:
        """To its stdin; waits while the guest does not read. Raises Unavailable when the program has ended."""
        view = memoryview(data)
        while view:
            with self._turn:
                self._turn.wait_for(lambda: self._room > 0 or self._over)
                if self._over:
                    raise Unavailable("the program has ended")
                piece = view[: min(self._room, frames.CHUNK)]
                self._room -= len(piece)
            self._send(frames.stdin(bytes(piece)))
            view = view[len(piece) :]

    def eof(self) -> None:
        """Close its stdin. A program that has ended meanwhile needs no end of input: reading tells how it ended."""
        with suppress(Unavailable):
            self._send(frames.eof())

    def signal(self, number: int) -> None:
        self._send(frames.signal(number))

    def resize(self, rows: int, columns: int) -> None:
        self._send(frames.resize(rows, columns))

    def collect(self, stdin: bytes = b"", timeout: float | None = None, max_output: int | None = None) -> Result:
        """Feed it, read it to its end.

        ``max_output``: bytes that it may print; the caller's close then kills it, and the result says so. Raises
        TimedOut (the program is then killed) after ``timeout`` seconds.
        """
        printed = Printed(max_output)
        expired = threading.Event()
        feeder = threading.Thread(target=self._feed, args=(stdin,), daemon=True)
        alarm = threading.Timer(timeout, self._expire, (expired,)) if timeout is not None else None
        feeder.start()
        if alarm:
            alarm.daemon = True
            alarm.start()
        try:
            for item in self:
                if not printed.take(item):
                    return printed.result(KILLED, "output")
        except CorralError as error:
            if expired.is_set():
                raise TimedOut(f"the program took longer than {timeout:g} s") from error
            raise
        finally:
            if alarm:
                alarm.cancel()
        assert self.status is not None
        return printed.result(self.status, "processes" if self.crowded else "")

    def _expire(self, expired: threading.Event) -> None:
        expired.set()
        self.close()

    def _feed(self, data: bytes) -> None:
        try:
            self.write(data)
            self.eof()
        except CorralError:
            return  # the reader tells why the connection is gone; a program may also end without reading its stdin


class Console(_Socket):
    """A VM's serial console. Bytes both ways."""

    def __init__(self, address: Address, call: Call, *, token: str = "", timeout: float = 60.0) -> None:
        super().__init__(_open(address, call, token, timeout))

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read():
            yield data

    def read(self, timeout: float | None = None) -> bytes:
        """What the guest printed; empty when the line has closed. Raises the daemon's error, or TimedOut."""
        try:
            message = self._connection.recv(timeout)
        except TimeoutError as error:
            raise TimedOut(f"nothing came for {timeout:g} s") from error
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == 1000:
                return b""
            raise Unavailable("the connection to the daemon was lost") from error
        if isinstance(message, str):
            raise frames.problem(message)
        return message

    def write(self, data: bytes) -> None:
        self._send(data)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the guest the terminal's size, where its agent can take it."""
        self._send(frames.console_size(rows, columns))
