"""The synchronous transport: HTTP/1.1 by the standard library, over a unix socket or TCP. It imports fast.

One connection is kept for requests; each stream has its own. A connection that is lost during a repeatable call is made
again for a while, so that a daemon may be restarted under a waiting command.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from corral.client.address import Address
from corral.client.calls import Call
from corral.client.frames import problem
from corral.errors import Refused, TimedOut, Unavailable, Unknown

PATIENCE_S = 10.0
"""How long a repeatable call whose connection was lost is tried again: a daemon restarts in a second or two."""
BLOCK = 1 << 20
LOST = (ConnectionError, http.client.BadStatusLine, http.client.IncompleteRead)
_NO_DAEMON = "`corral up` starts the daemon; `corral doctor` says what is wrong"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket, however deep its directory."""

    def __init__(self, address: Address, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._address = address

    def connect(self) -> None:
        name, directory = self._address.connectable()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(name)
        except BaseException:
            self.sock.close()
            raise
        finally:
            if directory is not None:
                os.close(directory)


class Http:
    """Sends calls. Not for several threads at once, except that streams are independent of everything else."""

    def __init__(self, address: Address, *, token: str = "", timeout: float = 60.0) -> None:
        self.address, self.token, self.timeout = address, token, timeout
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def send(self, call: Call, *, timeout: float | None = None) -> Any:
        """The decoded answer (None for an empty one, bytes for what is not JSON), or the daemon's error, raised."""
        give_up: float | None = None
        while True:
            try:
                return self._once(call, timeout or self.timeout)
            except LOST as error:
                self.close()
                give_up = give_up or time.monotonic() + PATIENCE_S
                if not call.repeatable:
                    raise Unknown(
                        f"the connection to {self.address.text} was lost during {call.method} {call.path}",
                        hint="look at the object before you repeat it",
                    ) from error
                if time.monotonic() > give_up:
                    raise Unavailable(f"the daemon at {self.address.text} does not answer", hint=_NO_DAEMON) from error
            except Unavailable as error:
                # Refused connections are only waited out once an earlier attempt had got through.
                if give_up is None or time.monotonic() > give_up or error.details.get("stage") != "connect":
                    raise
            time.sleep(0.1)

    def _once(self, call: Call, timeout: float) -> Any:
        connection, self._connection = self._connection or self._connect(timeout), None
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        try:
            self._request(connection, call)
            response = connection.getresponse()
            body = response.read()
        except TimeoutError as error:
            connection.close()
            raise TimedOut(f"the daemon at {self.address.text} took longer than {timeout:g} s to answer") from error
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self._connection = connection
        if response.status >= 400:
            raise problem(body)
        kind = response.headers.get("Content-Type", "")
        return (json.loads(body) if "json" in kind else body) if body else None

    def stream(self, call: Call, *, timeout: float | None = None) -> Stream:
        """Open an endless answer, on a connection of its own. ``timeout``: longest silence in it, None for any."""
        connection = self._connect(self.timeout)
        try:
            self._request(connection, call)
            response = connection.getresponse()
            if response.status >= 400:
                raise problem(response.read())
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
        except LOST as error:
            connection.close()
            raise Unavailable(f"the connection to {self.address.text} was lost", hint=_NO_DAEMON) from error
        except TimeoutError as error:
            connection.close()
            raise TimedOut(
                f"the daemon at {self.address.text} took longer than {self.timeout:g} s to answer"
            ) from error
        except BaseException:
            connection.close()
            raise
        return Stream(connection, response, self.address)

    def upload(self, call: Call, chunks: Iterable[bytes], length: int | None) -> Any:
        """Send a body as it comes; of unknown length in chunks. No deadline on the whole, only on each step."""
        connection = self._connect(self.timeout)
        headers = self._headers(call) | ({"Content-Length": str(length)} if length is not None else {})
        try:
            connection.request(call.method, call.path, chunks, headers, encode_chunked=length is None)
            connection.sock.settimeout(None)  # checking and converting a large image takes as long as it takes
            response = connection.getresponse()
            body = response.read()
        except LOST as error:
            raise self._early_answer(connection, error) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise problem(body)
        return json.loads(body)

    def _early_answer(self, connection: http.client.HTTPConnection, error: Exception) -> Exception:
        """A daemon that refuses an upload answers and closes before it has read everything: that answer counts."""
        try:
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return Unavailable(f"the connection to {self.address.text} was lost during the upload: {error}")
        return problem(body)

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {"Accept": "*/*", **call.headers}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return headers

    def _request(self, connection: http.client.HTTPConnection, call: Call) -> None:
        headers, body = self._headers(call), None
        if call.body is not None:
            body, headers["Content-Type"] = json.dumps(call.body).encode(), "application/json"
        connection.request(call.method, call.path, body, headers)

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        where = self.address
        if where.socket is not None:
            connection: http.client.HTTPConnection = _UnixConnection(where, timeout)
        elif where.secure:
            connection = http.client.HTTPSConnection(where.host, where.port, timeout=timeout)
        else:
            connection = http.client.HTTPConnection(where.host, where.port, timeout=timeout)
        try:
            connection.connect()
        except PermissionError as error:
            raise Refused(f"{where.text} belongs to another user", code="denied") from error
        except TimeoutError as error:
            raise TimedOut(f"no connection to {where.text} within {timeout:g} s", hint=_NO_DAEMON) from error
        except OSError as error:
            raise Unavailable(
                f"no daemon answers at {where.text}: {error.strerror or error}", hint=_NO_DAEMON, stage="connect"
            ) from error
        if where.socket is None and connection.sock is not None:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


class Stream:
    """An endless answer. Use as a context manager, or read to its end."""

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, address: Address
    ) -> None:
        self._connection, self._response, self._address = connection, response, address

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def abort(self) -> None:
        """End it from another thread: whoever reads is woken, and told that it broke off."""
        if self._connection.sock is not None:
            with suppress(OSError):  # the other side was faster
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def set_timeout(self, seconds: float | None) -> None:
        """Longest silence from now on."""
        if self._connection.sock is not None:
            self._connection.sock.settimeout(seconds)

    def read(self) -> bytes:
        """What has come, at least a byte; nothing at the end. Raises TimedOut after too long a silence."""
        try:
            return self._response.read1(BLOCK)
        except TimeoutError as error:
            raise TimedOut(f"the stream from {self._address.text} fell silent") from error
        except (*LOST, OSError) as error:
            raise Unavailable(f"the stream from {self._address.text} broke off") from error

    def lines(self) -> Iterator[bytes]:
        """Whole lines."""
        rest = b""
        while data := self.read():
            *whole, rest = (rest + data).split(b"\n")
            yield from whole
