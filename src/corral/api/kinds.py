"""One set of routes for every kind in the table: list, get, create, patch, delete.

The handlers are made, kind by kind, with the kind's own types as annotations: that is what OpenAPI shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from litestar import Response, delete, get, patch, post
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromQuery, HeaderParameter, JSONBody, PathParameter, QueryParameter

from corral.api import encode
from corral.api.paging import page_of, page_type
from corral.api.problems import documented
from corral.api.request import BODIES, ChangeBody
from corral.api.service import PATCHABLE, Service
from corral.model import Image, Task, Template, Vm
from corral.model.base import Resource
from corral.model.kinds import KINDS, Kind

Ref = Annotated[str, PathParameter(description="A name, an id, or the beginning of an id.")]
Project = Annotated[str, QueryParameter(description="Whose: the project.")]
Labels = Annotated[tuple[str, ...], QueryParameter(description="KEY=VALUE or KEY; several must all fit.")]
Text = FromQuery[str | None]
Number = FromQuery[int | None]
Flag = FromQuery[bool]
Key = Annotated[
    str | None, HeaderParameter(name="Idempotency-Key", description="The same key and body again: the same answer.")
]
IfMatch = Annotated[
    str | None, HeaderParameter(name="If-Match", description='Only if it still is at this revision: "N".')
]
IfNoneMatch = Annotated[str | None, HeaderParameter(name="If-None-Match", description='304 if it is at revision "N".')]


class VmsAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """VMs as written, and the task that starts each."""

    items: tuple[Vm, ...]
    tasks: tuple[Task, ...]


class ImagesAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """The image as written, and the task that brings it in."""

    items: tuple[Image, ...]
    tasks: tuple[Task, ...]


class TemplatesAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """The template as written, and the task that makes it."""

    items: tuple[Template, ...]
    tasks: tuple[Task, ...]


class TaskAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """The task of what was asked for."""

    task: Task


ACCEPTED: dict[str, type[msgspec.Struct]] = {"vm": VmsAccepted, "image": ImagesAccepted, "template": TemplatesAccepted}


_JSON_BODY: Any = JSONBody
"""For annotations that are made here, which a type checker cannot follow."""


def success(kind: Any, text: str, status: int = 200, media: str = encode.JSON) -> dict[int, ResponseSpec]:
    """One good answer as OpenAPI shows it."""
    return {status: ResponseSpec(kind, generate_examples=False, description=text, media_type=media)}


def routes(service: Service) -> list[HTTPRouteHandler]:
    """All routes of all kinds."""
    found: list[HTTPRouteHandler] = []
    for kind in KINDS.values():
        found += [_list(kind, service), _get(kind, service)]
        if kind.name in BODIES:
            found.append(_create(kind, service))
        if kind.name in PATCHABLE:
            found.append(_patch(kind, service))
        if kind.writable:
            found.append(_delete(kind, service))
    return found


def _named(handler: Callable[..., Any], verb: str, kind: Kind, **annotations: Any) -> Callable[..., Any]:
    handler.__name__ = handler.__qualname__ = f"{verb}_{kind.plural if verb == 'list' else kind.name}"
    handler.__annotations__ |= annotations
    return handler


def _list(kind: Kind, service: Service) -> HTTPRouteHandler:
    async def handler(
        project: Project = "default", all_projects: Flag = False, label: Labels = (),
        phase: Text = None, name: Text = None, limit: Number = None, cursor: Text = None,
    ) -> Response[bytes]:  # fmt: skip
        listing: Any = await service.objects.list(kind.cls, None if all_projects or not kind.scoped else project)
        page = page_of(
            kind,
            listing.items,
            listing.revision,
            labels=label,
            phase=phase,
            name=name,
            limit=limit,
            cursor=cursor,
        )
        return encode.json(page)

    return get(
        f"/v1/{kind.plural}", tags=[kind.plural], summary=f"List {kind.plural}", operation_id=f"list_{kind.plural}",
        responses=success(page_type(kind), "A page of them, by name.") | documented(),
    )(_named(handler, "list", kind))  # fmt: skip


def _get(kind: Kind, service: Service) -> HTTPRouteHandler:
    async def handler(ref: Ref, project: Project = "default", if_none_match: IfNoneMatch = None) -> Response[bytes]:
        obj: Resource = await service.objects.find(kind.cls, ref, project)
        if if_none_match is not None and encode.etag(obj) in if_none_match.replace("W/", "").split(","):
            return Response(b"", status_code=304, headers={"ETag": encode.etag(obj)}, media_type=encode.JSON)
        return encode.one(obj)

    return get(
        f"/v1/{kind.plural}/{{ref:str}}", tags=[kind.plural], summary=f"Show {kind.summary}",
        operation_id=f"get_{kind.name}",
        responses=success(kind.cls, "It, with its revision as ETag.") | success(None, "Unchanged.", 304) | documented(),
    )(_named(handler, "get", kind))  # fmt: skip


def _create(kind: Kind, service: Service) -> HTTPRouteHandler:
    async def handler(data: Any, idempotency_key: Key = None, dry_run: Flag = False) -> Response[bytes]:
        made = await service.create(kind.name, data.tree, key=idempotency_key or "", dry_run=dry_run)
        if isinstance(made, Resource):
            return encode.one(made, 201)
        return encode.json(made, 200 if dry_run else 202)

    accepted = ACCEPTED.get(kind.name)
    if accepted is None:
        good = success(kind.cls, "Made.", 201)
    else:
        good = success(accepted, "Written; the tasks say how far it is.", 202)
        good |= success(accepted, "What a dry run would have written.", 200)
    return post(
        f"/v1/{kind.plural}", tags=[kind.plural], summary=f"Create {kind.summary}", operation_id=f"create_{kind.name}",
        status_code=201 if accepted is None else 202, responses=good | documented(),
    )(_named(handler, "create", kind, data=_JSON_BODY[BODIES[kind.name]]))  # fmt: skip


def _patch(kind: Kind, service: Service) -> HTTPRouteHandler:
    async def handler(
        ref: Ref,
        data: JSONBody[ChangeBody],
        project: Project = "default",
        if_match: IfMatch = None,
        dry_run: Flag = False,
    ) -> Response[bytes]:
        revision = encode.revision(if_match)
        return encode.one(
            await service.patch(kind.name, ref, data.tree, project=project, revision=revision, dry_run=dry_run)
        )

    return patch(
        f"/v1/{kind.plural}/{{ref:str}}", tags=[kind.plural], summary=f"Change {kind.summary} (JSON merge patch)",
        operation_id=f"patch_{kind.name}", responses=success(kind.cls, "As it is now.") | documented(),
    )(_named(handler, "patch", kind))  # fmt: skip


def _delete(kind: Kind, service: Service) -> HTTPRouteHandler:
    path, summary = f"/v1/{kind.plural}/{{ref:str}}", f"Delete {kind.summary}"
    if kind.name == "vm":

        async def vm_handler(ref: Ref, project: Project = "default", force: Flag = False) -> Response[bytes]:
            return encode.json(TaskAccepted(task=await service.delete_vm(ref, project=project, force=force)), 202)

        return delete(
            path, tags=[kind.plural], summary=summary, operation_id="delete_vm", status_code=202,
            responses=success(TaskAccepted, "It goes; the task says how far it is.", 202) | documented(),
        )(_named(vm_handler, "delete", kind))  # fmt: skip

    async def handler(ref: Ref, project: Project = "default", if_match: IfMatch = None) -> None:
        revision = encode.revision(if_match)
        if kind.name == "image":
            await service.delete_image(ref, project=project, revision=revision)
        elif kind.name == "template":
            await service.delete_template(ref, project=project, revision=revision)
        else:
            await service.delete(kind.name, ref, project=project, revision=revision)

    return delete(
        path, tags=[kind.plural], summary=summary, operation_id=f"delete_{kind.name}", responses=documented()
    )(_named(handler, "delete", kind))  # fmt: skip
