"""Changes as they happen: one JSON line per transaction, a heartbeat in between, an error as the last line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, cast

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromQuery, QueryParameter
from litestar.response import Stream

from corral.api.kinds import success
from corral.api.problems import documented
from corral.api.service import Service
from corral.errors import CorralError, Invalid, Problem, to_problem
from corral.model.base import Resource
from corral.model.kinds import KINDS
from corral.model.strict import shown
from corral.store.objects import ObjectBatch, ObjectChange

HEARTBEAT_S = 10.0
"""So often a quiet stream shows that it lives; a client that misses three gives it up."""
NDJSON = "application/x-ndjson"
_encode = msgspec.json.Encoder(enc_hook=str).encode


class Filter(msgspec.Struct, frozen=True):
    """What of the changes is wanted: empty is everything."""

    project: str = ""
    id: str = ""

    def passes(self, change: ObjectChange) -> bool:
        """Whether a change is shown."""
        if self.id and change.id != self.id:
            return False
        obj = change.object or change.previous
        if not self.project or obj is None or not KINDS[change.kind].scoped:
            return True
        return obj.meta.project == self.project


def route(service: Service) -> HTTPRouteHandler:
    """GET /v1/watch."""

    @get(
        "/v1/watch", tags=["platform"], summary="Changes as they happen", operation_id="watch",
        responses=success(str, "One JSON object a line.", media=NDJSON) | documented(),
    )  # fmt: skip
    async def handler(
        kinds: Annotated[str, QueryParameter(description="Like vm,task; empty: all.", max_length=200)] = "",
        from_revision: Annotated[
            int | None, QueryParameter(name="from", ge=1, le=(1 << 63) - 1, description="First revision wanted.")
        ] = None,
        project: FromQuery[str] = "",
        id: FromQuery[str] = "",
    ) -> Response[Any]:
        classes = _classes(kinds)
        current = (await service.objects.store.range("/-/", limit=1)).revision
        start = current + 1 if from_revision is None else from_revision
        return cast("Response[Any]", Stream(_lines(service, classes, start, Filter(project, id)), media_type=NDJSON))

    return handler


def _classes(kinds: str) -> tuple[type[Resource], ...]:
    names = [name for name in kinds.split(",") if name]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise Invalid([Problem("kinds", f"there is no kind {shown(unknown[0])}", ", ".join(KINDS))])
    return tuple(KINDS[name].cls for name in names) or tuple(kind.cls for kind in KINDS.values())


async def _lines(
    service: Service, classes: tuple[type[Resource], ...], start: int, wanted: Filter
) -> AsyncIterator[bytes]:
    revision = start - 1
    yield line(revision, ())
    try:
        # aclosing: when the reader goes away the store's watch is closed with this generator, at once.
        async with aclosing(cast(Any, beating(service, classes, start))) as batches:
            async for batch in batches:
                if batch is None:
                    yield line(revision, ())
                    continue
                revision = batch.revision
                changes = tuple(change for change in batch.changes if wanted.passes(change))
                if changes:
                    yield line(revision, changes)
    except CorralError as error:
        yield failure_line(error)


async def beating(
    service: Service, classes: tuple[type[Resource], ...], start: int
) -> AsyncIterator[ObjectBatch | None]:
    """Batches, and None whenever nothing has come for a while."""
    async with aclosing(cast(Any, service.objects.watch(*classes, from_revision=start))) as batches:
        waiting: asyncio.Future[ObjectBatch] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(batches))
                done, _ = await asyncio.wait({waiting}, timeout=HEARTBEAT_S)
                if not done:
                    yield None
                    continue
                try:
                    batch = waiting.result()
                except StopAsyncIteration:
                    return
                finally:
                    waiting = None
                yield batch
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)


def failure_line(error: CorralError) -> bytes:
    """The last line of a stream that failed."""
    return _encode({"error": to_problem(error)}) + b"\n"


def line(revision: int, changes: tuple[ObjectChange, ...]) -> bytes:
    """What one transaction changed; nothing is a heartbeat."""
    told = [{"kind": change.kind, "id": change.id, "object": change.object} for change in changes]
    return _encode({"revision": revision, "changes": told}) + b"\n"
