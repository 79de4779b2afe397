"""The nouns of the synchronous client: what every kind can do, and what images, hosts, tasks and events add."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from corral.client import calls
from corral.client.record import BUILT, FINAL, RECONNECT_S, Accepted, Batch, Page, Record, read_batch, task_error
from corral.errors import NotFound, Refused, TimedOut, Unavailable, WatchLost

if TYPE_CHECKING:
    from corral.client.sync import Client

Progress = Callable[[Record], None]


class Resource:
    """Objects of one kind. ``ref`` is a name, ``PROJECT/NAME``, an id or the beginning of one."""

    record: type[Record] = Record

    def __init__(self, client: Client, plural: str) -> None:
        self._client, self._plural = client, plural

    def page(self, *, limit: int | None = None, cursor: str | None = None, **filters: Any) -> Page:
        """One page of a listing; see :meth:`list` for the filters."""
        filters.setdefault("project", self._client.project)
        answer = self._client.http.send(calls.listing(self._plural, limit=limit, cursor=cursor, **filters))
        return Page([self._record(item) for item in answer["items"]], answer["revision"], answer.get("next"))

    def list(
        self, *, project: str | None = None, all_projects: bool = False, labels: Mapping[str, str] | None = None,
        phase: str = "", name: str = "",
    ) -> list[Record]:  # fmt: skip
        """All that match, sorted by name."""
        filters: dict[str, Any] = {"all_projects": all_projects, "labels": labels, "phase": phase, "name": name}
        found, cursor = [], None
        while True:
            page = self.page(cursor=cursor, project=project or self._client.project, **filters)
            found += page.items
            cursor = page.cursor
            if cursor is None:
                return found

    def get(self, ref: str, *, project: str | None = None) -> Record:
        return self._record(self._client.http.send(calls.get(self._plural, ref, project or self._client.project)))

    def create(
        self, spec: Mapping[str, Any], *, name: str | None = None, project: str | None = None,
        labels: Mapping[str, str] | None = None, key: str | None = None,
    ) -> Record:  # fmt: skip
        """A new object. ``key``: idempotency key; the same key and body again give the same answer."""
        return self._record(
            self._client.http.send(
                calls.create(
                    self._plural, spec, name=name, project=project or self._client.project, labels=labels, key=key
                )
            )
        )

    def patch(
        self, ref: str, *, spec: Mapping[str, Any] | None = None, labels: Mapping[str, str | None] | None = None,
        revision: int | None = None, project: str | None = None, dry_run: bool = False,
    ) -> Record:  # fmt: skip
        """Merge into spec and labels (None removes). ``revision``: Refused ``stale`` unless it still has that one."""
        call = calls.patch(
            self._plural,
            ref,
            project or self._client.project,
            spec=spec,
            labels=labels,
            revision=revision,
            dry_run=dry_run,
        )
        return self._record(self._client.http.send(call))

    def delete(self, ref: str, *, project: str | None = None) -> None:
        self._client.http.send(calls.delete(self._plural, ref, project or self._client.project))

    def _record(self, item: dict[str, Any]) -> Record:
        return self.record(item)

    def _accepted(self, answer: dict[str, Any]) -> Accepted:
        return Accepted([self._record(item) for item in answer["items"]], [Record(task) for task in answer["tasks"]])


class Images(Resource):
    """Images: built, fetched or uploaded."""

    def build(self, recipe: str, *, name: str | None = None, arch: str | None = None, **options: Any) -> Accepted:
        """Build a recipe (``micro``, ``debian``). Options: project, labels, timeout_s, key."""
        spec = {"source": "build", "recipe": recipe} | ({"arch": arch} if arch else {})
        return self.begin(spec, name=name or recipe, **options)

    def pull(self, entry: str, *, name: str | None = None, arch: str | None = None, **options: Any) -> Accepted:
        """Fetch an entry of the catalogue."""
        spec = {"source": "catalogue", "recipe": entry} | ({"arch": arch} if arch else {})
        return self.begin(spec, name=name or entry, **options)

    def begin(
        self, spec: Mapping[str, Any], *, name: str | None, project: str | None = None,
        labels: Mapping[str, str] | None = None, timeout_s: float | None = None, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """A new image of any source, and the task that brings it in (an upload waits for :meth:`upload`)."""
        call = calls.create(
            "images",
            spec,
            name=name,
            project=project or self._client.project,
            labels=labels,
            key=key,
            timeout_s=timeout_s,
        )
        return self._accepted(self._client.http.send(call))

    def ensure(self, name: str) -> bool:
        """Have the image of this name ready, built or fetched now if need be; False if nobody knows how to get it."""
        if name not in BUILT and name not in {entry["name"] for entry in self.catalogue()}:
            return False
        wanted = {"source": "build" if name in BUILT else "catalogue", "recipe": name}
        try:
            tasks = self.begin(wanted, name=name).tasks
        except Refused as error:
            if error.code != "exists":
                raise
            tasks = self._client.tasks.open_about(self.get(name).id)
        for task in tasks:
            self._client.tasks.wait(task.id)
        return True

    def upload(
        self, ref: str, content: str | os.PathLike[str] | BinaryIO | Iterable[bytes], *, length: int | None = None,
        project: str | None = None, on_bytes: Callable[[int], None] | None = None,
    ) -> Accepted:  # fmt: skip
        """Send the bytes of an image whose source is ``upload``. ``on_bytes`` is told how many have gone."""
        call = calls.content(ref, project or self._client.project)
        if isinstance(content, (str, os.PathLike)):
            with Path(content).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                return self._accepted(self._client.http.upload(call, _counted(_blocks(file), on_bytes), size))
        chunks = _blocks(content) if hasattr(content, "read") else iter(content)
        return self._accepted(self._client.http.upload(call, _counted(chunks, on_bytes), length))

    def catalogue(self) -> list[dict[str, Any]]:
        """What can be built or pulled."""
        return list(self._client.http.send(calls.plain("catalogue"))["items"])


class Templates(Resource):
    """Booted VMs, frozen."""

    def begin(
        self, spec: Mapping[str, Any], *, name: str | None = None, project: str | None = None,
        labels: Mapping[str, str] | None = None, timeout_s: float | None = None, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """A new template (spec: image, cpus, memory …), and the task that makes it."""
        scope = project or self._client.project
        call = calls.create("templates", spec, name=name, project=scope, labels=labels, key=key, timeout_s=timeout_s)
        return self._accepted(self._client.http.send(call))


class Hosts(Resource):
    """The machines that run VMs."""

    def probe(self, ref: str) -> Record:
        """Find out again which accelerators really work."""
        return Record(self._client.http.send(calls.probe(ref)))


class Tasks(Resource):
    """Durable operations."""

    def cancel(self, ref: str) -> Record:
        return Record(self._client.http.send(calls.cancel(ref)))

    def open_about(self, target: str) -> list[Record]:
        """The tasks about an object (its id) that have not ended."""
        return [t for t in self.list() if t.spec["target_id"] == target and t.phase not in FINAL]

    def wait(self, ref: str, *, timeout: float | None = None, on_change: Progress | None = None) -> Record:
        """The task when it is done. Raises its error when it failed or was cancelled; TimedOut when we stop waiting.

        Survives a restart of the daemon. ``on_change`` is called with the task at first and at every change.
        """
        for task in self._client.follow("task", self.get(ref), timeout):
            if on_change is not None:
                on_change(task)
            if task.phase == "done":
                return task
            if task.phase in ("failed", "cancelled"):
                raise task_error(task)
        raise NotFound(f"task {ref} was deleted while it was waited for")


class Events(Resource):
    """What happened."""

    def watch(self, *, project: str | None = None, from_revision: int | None = None) -> Iterator[Record]:
        """Events as they happen, until the caller stops."""
        for batch in self._client.watch("event", project=project, from_revision=from_revision):
            for change in batch.changes:
                if change["object"] is not None:
                    yield Record(change["object"])


def read_batches(lines: Iterator[bytes]) -> Iterator[Batch]:
    """The batches of a watch stream. Raises the error with which it ends, if one is told."""
    for line in lines:
        yield read_batch(line)


def follow(client: Client, kind: str, first: Record, timeout: float | None) -> Iterator[Record]:
    """An object now and at each change, until it is deleted. See :meth:`Client.follow`."""
    until = None if timeout is None else time.monotonic() + timeout
    lost: float | None = None
    known, id = first, first.id
    yield known
    while True:
        try:
            for batch in client.watch(kind, from_revision=known.revision + 1, id=id, until=until):
                lost = None
                for change in batch.changes:
                    if change["object"] is None:
                        return
                    known = type(first)(change["object"])
                    yield known
                if until is not None and time.monotonic() >= until:
                    raise TimedOut(f"{kind} {known.name} was waited for {timeout:g} s")
        except TimedOut:
            if until is not None and time.monotonic() >= until:
                raise TimedOut(f"{kind} {known.name} was waited for {timeout:g} s") from None
        except (Unavailable, WatchLost):
            lost = lost or time.monotonic()
            if time.monotonic() - lost > RECONNECT_S:
                raise
            time.sleep(0.1)
        try:
            # The stream broke: what happened meanwhile is read, then watched from there.
            now = client.read(kind, id, type(first))
        except NotFound:
            return
        except Unavailable:
            continue
        if now.revision > known.revision:
            known = now
            yield known


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


def _counted(chunks: Iterable[bytes], on_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        yield chunk
        total += len(chunk)
        if on_bytes is not None:
            on_bytes(total)
