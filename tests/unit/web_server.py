"""A web server that a test can make lie, stall and break off."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Asked:
    """One request: its path and headers (names in lower case)."""

    path: str
    headers: dict[str, str]

    @property
    def start(self) -> int:
        """First byte that a Range header asks for."""
        text = self.headers.get("range", "bytes=0-")
        return int(text.removeprefix("bytes=").rstrip("-"))


@dataclass
class WebServer:
    """Answers each request by ``answer(asked, writer)``; remembers what was asked."""

    answer: Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]
    port: int = 0
    asked: list[Asked] = field(default_factory=list)

    def url(self, path: str = "/disk.img") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.split("\r\n")
            headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines if line}
            asked = Asked(first.split()[1], headers)
            self.asked.append(asked)
            await self.answer(asked, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the client had enough
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def serving(
    answer: Callable[[Asked, asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[WebServer]:
    """The server while the block runs, on a free port of 127.0.0.1."""
    web = WebServer(answer)
    server = await asyncio.start_server(web._serve, "127.0.0.1", 0, ssl=tls)
    web.port = server.sockets[0].getsockname()[1]
    try:
        yield web
    finally:
        server.close()


def head(status: int, **headers: object) -> bytes:
    """Status line and headers (underscores become dashes)."""
    lines = [f"HTTP/1.1 {status} Whatever", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
