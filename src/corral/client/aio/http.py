"""The asynchronous transport: httpx2, over a unix socket or TCP. The only file that knows it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from corral.client.address import Address
from corral.client.calls import Call
from corral.client.frames import problem
from corral.errors import Refused, TimedOut, Unavailable, Unknown

PATIENCE_S = 10.0
"""How long a repeatable call whose connection was lost is tried again: a daemon restarts in a second or two."""
_NO_DAEMON = "`corral up` starts the daemon; `corral doctor` says what is wrong"
LOST = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError, httpx2.CloseError)


class AsyncHttp:
    """Sends calls, any number at once."""

    def __init__(self, address: Address, *, token: str = "", timeout: float = 60.0) -> None:
        self.address, self.token, self.timeout = address, token, timeout
        self._directory: int | None = None
        self._client: httpx2.AsyncClient | None = None

    def _open(self) -> httpx2.AsyncClient:
        if self._client is None:
            scheme = "https" if self.address.secure else "http"
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            transport: httpx2.AsyncHTTPTransport | None = None
            if self.address.socket is not None:
                name, self._directory = self.address.connectable()
                transport = httpx2.AsyncHTTPTransport(uds=name, limits=httpx2.Limits(max_connections=None))
            self._client = httpx2.AsyncClient(
                base_url=f"{scheme}://{self.address.authority}", transport=transport, headers=headers,
                timeout=self.timeout, trust_env=False, limits=httpx2.Limits(max_connections=None),
            )  # fmt: skip
        return self._client

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    async def send(self, call: Call, *, timeout: float | None = None) -> Any:
        """The decoded answer (None for an empty one, bytes for what is not JSON), or the daemon's error, raised."""
        give_up: float | None = None
        while True:
            try:
                return await self._once(call, timeout or self.timeout)
            except LOST as error:
                if not call.repeatable:
                    raise Unknown(
                        f"the connection to {self.address.text} was lost during {call.method} {call.path}",
                        hint="look at the object before you repeat it",
                    ) from error
                give_up = give_up or time.monotonic() + PATIENCE_S
                if time.monotonic() > give_up:
                    raise self._gone(error) from error
            except httpx2.ConnectError as error:
                # Refused connections are only waited out once an earlier attempt had got through.
                if give_up is None or time.monotonic() > give_up:
                    raise self._gone(error) from error
            await asyncio.sleep(0.1)

    async def _once(self, call: Call, timeout: float) -> Any:
        body = None if call.body is None else json.dumps(call.body).encode()
        headers = dict(call.headers) | ({} if body is None else {"Content-Type": "application/json"})
        try:
            answer = await self._open().request(call.method, call.path, content=body, headers=headers, timeout=timeout)
        except httpx2.TimeoutException as error:
            raise TimedOut(f"the daemon at {self.address.text} took longer than {timeout:g} s to answer") from error
        if answer.status_code >= 400:
            raise problem(answer.content)
        if not answer.content:
            return None
        return answer.json() if "json" in answer.headers.get("Content-Type", "") else answer.content

    @asynccontextmanager
    async def stream(self, call: Call, *, timeout: float | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """An endless answer, piece by piece. ``timeout``: longest silence in it, None for any."""
        limits = httpx2.Timeout(self.timeout, read=timeout)
        try:
            async with self._open().stream(
                call.method, call.path, headers=dict(call.headers), timeout=limits
            ) as answer:
                if answer.status_code >= 400:
                    raise problem(await answer.aread())
                yield answer.aiter_bytes()
        except httpx2.ConnectError as error:
            raise self._gone(error) from error
        except httpx2.TimeoutException as error:
            raise TimedOut(f"the stream from {self.address.text} fell silent") from error
        except LOST as error:
            raise Unavailable(f"the stream from {self.address.text} broke off", hint=_NO_DAEMON) from error

    async def upload(self, call: Call, chunks: AsyncIterator[bytes], length: int | None) -> Any:
        """Send a body as it comes. No deadline on the whole: checking a large image takes as long as it takes."""
        headers = dict(call.headers) | ({} if length is None else {"Content-Length": str(length)})
        limits = httpx2.Timeout(self.timeout, read=None)
        try:
            answer = await self._open().request(call.method, call.path, content=chunks, headers=headers, timeout=limits)
        except httpx2.ConnectError as error:
            raise self._gone(error) from error
        except (*LOST, httpx2.TimeoutException) as error:
            raise Unavailable(f"the connection to {self.address.text} was lost during the upload") from error
        if answer.status_code >= 400:
            raise problem(answer.content)
        return answer.json()

    def _gone(self, error: Exception) -> Refused | Unavailable:
        if isinstance(error.__cause__, PermissionError) or "Permission denied" in str(error):
            return Refused(f"{self.address.text} belongs to another user", code="denied")
        return Unavailable(f"no daemon answers at {self.address.text}: {error}", hint=_NO_DAEMON)


async def lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole lines of a stream."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
