"""The asynchronous client: ``async with corral.connect() as c: vm = await c.vms.launch("debian")``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

from corral.client import calls, local
from corral.client.address import resolve
from corral.client.aio.http import AsyncHttp, lines
from corral.client.aio.resources import Events, Hosts, Images, Resource, Tasks, Templates
from corral.client.aio.sandbox import AsyncSandbox, sandbox
from corral.client.aio.vms import AsyncVm, Vms
from corral.client.record import PLURALS, RECONNECT_S, SILENCE_S, Batch, Record, read_batch
from corral.errors import NotFound, TimedOut, Unavailable, WatchLost

__all__ = ["AsyncClient", "AsyncSandbox", "AsyncVm", "connect", "sandbox"]


class AsyncClient:
    """A connection to a daemon; made lazily.

    Args:
        url: ``http(s)://HOST:PORT`` or ``unix:/PATH``; default ``CORRAL_URL``, then this machine's daemon.
        state: the local daemon's state directory, instead of ``CORRAL_STATE``.
        project: whose things bare names mean; default ``CORRAL_PROJECT``, then ``default``.
        timeout: longest time for one request, seconds (waits and streams have their own).
    """

    def __init__(
        self, url: str | None = None, *, state: str | os.PathLike[str] | None = None, token: str | None = None,
        project: str | None = None, timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.project = project or os.environ.get("CORRAL_PROJECT") or "default"
        self.http = AsyncHttp(resolve(url, state), token=token or os.environ.get("CORRAL_TOKEN", ""), timeout=timeout)
        self.vms = Vms(self, "vms")
        self.images = Images(self, "images")
        self.templates = Templates(self, "templates")
        self.flavors = Resource(self, "flavors")
        self.volumes = Resource(self, "volumes")
        self.networks = Resource(self, "networks")
        self.projects = Resource(self, "projects")
        self.hosts = Hosts(self, "hosts")
        self.tasks = Tasks(self, "tasks")
        self.events = Events(self, "events")

    async def __aenter__(self) -> AsyncClient:
        """This machine's daemon is started if none runs."""
        await asyncio.to_thread(local.ensure, self.http.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.http.close()

    async def version(self) -> dict[str, Any]:
        """``version``, ``pid``, ``state`` … of the daemon."""
        return dict(await self.http.send(calls.plain("version")))

    async def doctor(self) -> list[dict[str, Any]]:
        """Checks of this host: ``name``, ``ok`` (true, false or "warn"), ``message``, ``hint``."""
        return list((await self.http.send(calls.plain("doctor")))["items"])

    async def usage(self) -> dict[str, Any]:
        """Who uses what on this host, now: ``host``, ``projects``, ``vms``. CPU in cores, memory in bytes."""
        return dict(await self.http.send(calls.plain("usage")))

    async def schema(self) -> dict[str, Any]:
        """The structure of every kind."""
        return dict(await self.http.send(calls.plain("schema")))

    async def watch(
        self, *kinds: str, project: str | None = None, from_revision: int | None = None, id: str = ""
    ) -> AsyncIterator[Batch]:
        """Changes of these kinds (all without any), as they happen. The first batch is empty: it says where it starts.

        Raises WatchLost: list again and start from there.
        """
        call = calls.watch(kinds, project=project or "", from_revision=from_revision, id=id)
        async with self.http.stream(call, timeout=SILENCE_S) as pieces:
            async for line in lines(pieces):
                yield read_batch(line)

    async def follow(self, kind: str, first: Record, timeout: float | None = None) -> AsyncIterator[Record]:
        """``first``, then the same object at each of its changes, across restarts of the daemon; ends when deleted."""
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        async with aclosing(cast(Any, self._follow(kind, first))) as objects:
            while True:
                # Only the waiting is bounded, never what the caller does with an object.
                limit = asyncio.timeout_at(until)
                try:
                    async with limit:
                        obj = await anext(objects, None)
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    raise TimedOut(f"{kind} {first.name} was waited for {timeout:g} s") from error
                if obj is None:
                    return
                yield obj

    async def _follow(self, kind: str, known: Record) -> AsyncIterator[Record]:
        lost: float | None = None
        yield known
        while True:
            try:
                watch = self.watch(kind, from_revision=known.revision + 1, id=known.id)
                async with aclosing(cast(Any, watch)) as batches:
                    async for batch in batches:
                        lost = None
                        for change in batch.changes:
                            if change["object"] is None:
                                return
                            known = Record(change["object"])
                            yield known
            except (Unavailable, WatchLost):
                lost = lost or time.monotonic()
                if time.monotonic() - lost > RECONNECT_S:
                    raise
                await asyncio.sleep(0.1)
            try:
                # The stream broke: what happened meanwhile is read, then watched from there.
                now = Record(await self.http.send(calls.get(PLURALS[kind], known.id, self.project)))
            except NotFound:
                return
            except Unavailable:
                continue
            if now.revision > known.revision:
                known = now
                yield known


def connect(url: str | None = None, **options: Any) -> AsyncClient:
    """A client of this machine's daemon, or of ``url``. Options are those of :class:`AsyncClient`."""
    return AsyncClient(url, **options)
