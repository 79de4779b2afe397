"""The nouns of the asynchronous client; the twins of :mod:`corral.client.sync.resources`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.client import calls
from corral.client.record import BUILT, FINAL, Accepted, Page, Record, task_error
from corral.errors import NotFound, Refused

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient

Progress = Callable[[Record], None]


class Resource:
    """Objects of one kind. ``ref`` is a name, ``PROJECT/NAME``, an id or the beginning of one."""

    def __init__(self, client: AsyncClient, plural: str) -> None:
        self._client, self._plural = client, plural

    async def page(self, *, limit: int | None = None, cursor: str | None = None, **filters: Any) -> Page:
        """One page of a listing; see :meth:`list` for the filters."""
        filters.setdefault("project", self._client.project)
        answer = await self._client.http.send(calls.listing(self._plural, limit=limit, cursor=cursor, **filters))
        return Page([self._record(item) for item in answer["items"]], answer["revision"], answer.get("next"))

    async def list(
        self, *, project: str | None = None, all_projects: bool = False, labels: Mapping[str, str] | None = None,
        phase: str = "", name: str = "",
    ) -> list[Record]:  # fmt: skip
        """All that match, sorted by name."""
        filters: dict[str, Any] = {"all_projects": all_projects, "labels": labels, "phase": phase, "name": name}
        found, cursor = [], None
        while True:
            page = await self.page(cursor=cursor, project=project or self._client.project, **filters)
            found += page.items
            cursor = page.cursor
            if cursor is None:
                return found

    async def get(self, ref: str, *, project: str | None = None) -> Record:
        return self._record(await self._client.http.send(calls.get(self._plural, ref, project or self._client.project)))

    async def create(
        self, spec: Mapping[str, Any], *, name: str | None = None, project: str | None = None,
        labels: Mapping[str, str] | None = None, key: str | None = None,
    ) -> Record:  # fmt: skip
        """A new object. ``key``: idempotency key; the same key and body again give the same answer."""
        scope = project or self._client.project
        call = calls.create(self._plural, spec, name=name, project=scope, labels=labels, key=key)
        return self._record(await self._client.http.send(call))

    async def patch(
        self, ref: str, *, spec: Mapping[str, Any] | None = None, labels: Mapping[str, str | None] | None = None,
        revision: int | None = None, project: str | None = None, dry_run: bool = False,
    ) -> Record:  # fmt: skip
        """Merge into spec and labels (None removes). ``revision``: Refused ``stale`` unless it still has that one."""
        scope = project or self._client.project
        call = calls.patch(self._plural, ref, scope, spec=spec, labels=labels, revision=revision, dry_run=dry_run)
        return self._record(await self._client.http.send(call))

    async def delete(self, ref: str, *, project: str | None = None) -> None:
        await self._client.http.send(calls.delete(self._plural, ref, project or self._client.project))

    def _record(self, item: dict[str, Any]) -> Record:
        return Record(item)

    def _accepted(self, answer: dict[str, Any]) -> Accepted:
        return Accepted([self._record(item) for item in answer["items"]], [Record(task) for task in answer["tasks"]])


class Images(Resource):
    """Images: built, fetched or uploaded."""

    async def build(self, recipe: str, *, name: str | None = None, arch: str | None = None, **options: Any) -> Accepted:
        """Build a recipe (``micro``, ``debian``). Options: project, labels, timeout_s, key."""
        spec = {"source": "build", "recipe": recipe} | ({"arch": arch} if arch else {})
        return await self.begin(spec, name=name or recipe, **options)

    async def pull(self, entry: str, *, name: str | None = None, arch: str | None = None, **options: Any) -> Accepted:
        """Fetch an entry of the catalogue."""
        spec = {"source": "catalogue", "recipe": entry} | ({"arch": arch} if arch else {})
        return await self.begin(spec, name=name or entry, **options)

    async def begin(
        self, spec: Mapping[str, Any], *, name: str | None, project: str | None = None,
        labels: Mapping[str, str] | None = None, timeout_s: float | None = None, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """A new image of any source, and the task that brings it in (an upload waits for :meth:`upload`)."""
        scope = project or self._client.project
        call = calls.create("images", spec, name=name, project=scope, labels=labels, key=key, timeout_s=timeout_s)
        return self._accepted(await self._client.http.send(call))

    async def ensure(self, name: str) -> bool:
        """Have the image of this name ready, built or fetched now if need be; False if nobody knows how to get it."""
        if name not in BUILT and name not in {entry["name"] for entry in await self.catalogue()}:
            return False
        wanted = {"source": "build" if name in BUILT else "catalogue", "recipe": name}
        try:
            tasks = (await self.begin(wanted, name=name)).tasks
        except Refused as error:
            if error.code != "exists":
                raise
            tasks = await self._client.tasks.open_about((await self.get(name)).id)
        for task in tasks:
            await self._client.tasks.wait(task.id)
        return True

    async def upload(
        self, ref: str, content: str | os.PathLike[str] | AsyncIterator[bytes], *, length: int | None = None,
        project: str | None = None, on_bytes: Callable[[int], None] | None = None,
    ) -> Accepted:  # fmt: skip
        """Send the bytes of an image whose source is ``upload``. ``on_bytes`` is told how many have gone."""
        call = calls.content(ref, project or self._client.project)
        if isinstance(content, (str, os.PathLike)):
            length = await asyncio.to_thread(os.path.getsize, content)
            content = _blocks(Path(content))
        return self._accepted(await self._client.http.upload(call, _counted(content, on_bytes), length))

    async def catalogue(self) -> list[dict[str, Any]]:
        """What can be built or pulled."""
        return [*(await self._client.http.send(calls.plain("catalogue")))["items"]]


class Templates(Resource):
    """Booted VMs, frozen."""

    async def begin(
        self, spec: Mapping[str, Any], *, name: str | None = None, project: str | None = None,
        labels: Mapping[str, str] | None = None, timeout_s: float | None = None, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """A new template (spec: image, cpus, memory …), and the task that makes it."""
        scope = project or self._client.project
        call = calls.create("templates", spec, name=name, project=scope, labels=labels, key=key, timeout_s=timeout_s)
        return self._accepted(await self._client.http.send(call))


class Hosts(Resource):
    """The machines that run VMs."""

    async def probe(self, ref: str) -> Record:
        """Find out again which accelerators really work."""
        return Record(await self._client.http.send(calls.probe(ref)))


class Tasks(Resource):
    """Durable operations."""

    async def cancel(self, ref: str) -> Record:
        return Record(await self._client.http.send(calls.cancel(ref)))

    async def open_about(self, target: str) -> list[Record]:
        """The tasks about an object (its id) that have not ended."""
        return [t for t in await self.list() if t.spec["target_id"] == target and t.phase not in FINAL]

    async def wait(self, ref: str, *, timeout: float | None = None, on_change: Progress | None = None) -> Record:
        """The task when it is done. Raises its error when it failed or was cancelled; TimedOut when we stop waiting.

        Survives a restart of the daemon. ``on_change`` is called with the task at first and at every change.
        """
        async for task in self._client.follow("task", await self.get(ref), timeout):
            if on_change is not None:
                on_change(task)
            if task.phase == "done":
                return task
            if task.phase in ("failed", "cancelled"):
                raise task_error(task)
        raise NotFound(f"task {ref} was deleted while it was waited for")


class Events(Resource):
    """What happened."""

    async def watch(self, *, project: str | None = None, from_revision: int | None = None) -> AsyncIterator[Record]:
        """Events as they happen, until the caller stops."""
        async for batch in self._client.watch("event", project=project, from_revision=from_revision):
            for change in batch.changes:
                if change["object"] is not None:
                    yield Record(change["object"])


async def _blocks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while block := await asyncio.to_thread(file.read, 1 << 20):
            yield block


async def _counted(chunks: AsyncIterator[bytes], on_bytes: Callable[[int], None] | None) -> AsyncIterator[bytes]:
    total = 0
    async for chunk in chunks:
        yield chunk
        total += len(chunk)
        if on_bytes is not None:
            on_bytes(total)
