"""Holding an ephemeral VM: a stream that tells how it is, and keeps it alive for as long as somebody reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Stream

from corral.api.kinds import Project, Ref, success
from corral.api.problems import documented
from corral.api.service import Service
from corral.api.watch import NDJSON, beating, failure_line, line
from corral.errors import CorralError, NotFound
from corral.model import Task, Vm
from corral.store.objects import ObjectChange


def route(service: Service) -> HTTPRouteHandler:
    """GET /v1/vms/{ref}/hold."""

    @get(
        "/v1/vms/{ref:str}/hold", tags=["vms"], summary="Hold an ephemeral VM", operation_id="hold_vm",
        responses=success(str, "The VM and its tasks, then their changes, one JSON object a line.", media=NDJSON)
        | documented(),
    )  # fmt: skip
    async def handler(ref: Ref, project: Project = "default") -> Response[Any]:
        vm = await service.objects.find(Vm, ref, project)
        return cast("Response[Any]", Stream(_lines(service, vm.meta.id), media_type=NDJSON))

    return handler


async def _lines(service: Service, id: str) -> AsyncIterator[bytes]:
    """Lines as of a watch; the first one has everything as it is. Ends with the VM."""
    key = ""
    try:
        key = await service.holds.take(id)
        revision = (await service.objects.store.range("/-/", limit=1)).revision
        vm, tasks = await service.objects.get(Vm, id), await service.objects.list(Task)
        now = [ObjectChange(obj.KIND, obj.meta.id, obj, None) for obj in (vm, *tasks.items) if _about(obj, id)]
        yield line(revision, tuple(now))
        async with aclosing(cast(Any, beating(service, (Vm, Task), revision + 1))) as batches:
            async for batch in batches:
                changes = tuple(c for c in batch.changes if _about(c.object or c.previous, id)) if batch else ()
                revision = batch.revision if batch else revision
                if changes or batch is None:
                    yield line(revision, changes)
                if any(change.kind == Vm.KIND and change.object is None for change in changes):
                    return
    except NotFound:
        return  # deleted before it could be held: the same as afterwards
    except CorralError as error:
        yield failure_line(error)
    finally:
        if key:
            service.holds.release(key)


def _about(obj: Any, id: str) -> bool:
    return obj is not None and id in (obj.meta.id, obj.spec.target_id if isinstance(obj, Task) else "")
