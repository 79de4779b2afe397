"""What stands before every request: who may ask (Host, Origin), how many at once, and the headers of every answer.

Plain ASGI, so that it costs microseconds and sees errors of the framework too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, NamedTuple, Protocol

from corral.api.problems import MEDIA, body_of
from corral.errors import CorralError, Refused, Unavailable
from corral.runtime import Clock

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Lane(NamedTuple):
    """Requests of one kind, counted by themselves: many of one keep none of another waiting."""

    most: int
    """Beyond that the answer is 503 at once: waiting longer would help nobody."""
    refusal: str
    hint: str = "try again in a moment"


WAITING = Lane(1000, "the daemon has too much to do")
"""Requests whose answer has not begun."""
SENDING = Lane(1000, "too many answers are being read slowly")
"""Answers that have begun."""
STREAMS = Lane(1000, "too many watches and followed logs are open", "close some")
HOLDS = Lane(1000, "too many ephemeral VMs are held", "corral run and sandboxes end theirs; then try again")
_LONG = ((re.compile(r"/v1/vms/.+/hold/*"), HOLDS), (re.compile(r"/v1/watch/*|/v1/vms/.+/log/*"), STREAMS))
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


class Observer(Protocol):
    """Is told of every answer."""

    def __call__(self, method: str, route: str, code: int, seconds: float) -> None:
        """``route``: the template of the path, empty for none. ``seconds``: until the answer began."""
        ...


class Gate:
    """Wraps the application. ``hosts``: names that a TCP client may call us by (DNS rebinding would use another)."""

    def __init__(self, app: App, clock: Clock, observer: Observer, *, hosts: Iterable[str] = LOOPBACK) -> None:
        self._app, self._clock, self._observer = app, clock, observer
        self._hosts = frozenset(hosts)
        self._open: Counter[Lane] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message[:100]})
            return
        long = next((lane for form, lane in _LONG if form.fullmatch(scope["path"])), None)
        full = [lane for lane in ((long,) if long else (WAITING, SENDING)) if self._open[lane] >= lane.most]
        if refusal is None and full:
            refusal = Unavailable(full[0].refusal, hint=full[0].hint)
        if refusal is not None:
            self._observer(scope["method"], "", refusal.http_status, 0.0)
            await _refuse(refusal, send)
            return
        await self._serve(scope, receive, send, long)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, long: Lane | None) -> None:
        lane, came = long or WAITING, self._clock.monotonic()
        self._open[lane] += 1

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal lane
            if message["type"] == "http.response.start":
                self._open[lane] -= 1
                lane = long or SENDING
                self._open[lane] += 1
                took = self._clock.monotonic() - came
                self._observer(scope["method"], scope.get("path_template", ""), message["status"], took)
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._open[lane] -= 1

    def _refusal(self, scope: Scope) -> CorralError | None:
        """Why a request over TCP is not for us. Of a unix socket (no client address) its file's mode decides."""
        if scope.get("client") is None:
            return None
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        host = headers.get(b"host", "")
        if _bare(host) not in self._hosts:
            return Refused(f"this is not {ascii(host)[:80]}", code="denied", hint="use localhost or 127.0.0.1")
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refused("requests of other sites' pages are not served", code="denied")
        return None


def _bare(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


async def _refuse(error: CorralError, send: Send) -> None:
    body = body_of(error)
    headers = [(b"content-type", MEDIA.encode()), (b"content-length", str(len(body)).encode()), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": error.http_status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
