"""Routes about the platform itself, and those of images, tasks and hosts that are not like the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Request, Response, get, post, put
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import OpenAPIFormat, OpenAPIMediaType, OpenAPIType, Operation, RequestBody, Schema

from corral.api import encode
from corral.api.bodies import CatalogueEntry
from corral.api.kinds import ImagesAccepted, Project, Ref, success
from corral.api.live import Live
from corral.api.problems import documented
from corral.api.service import Service
from corral.errors import Invalid, Problem
from corral.model import Host, Image, Task
from corral.model.schema import all_kinds
from corral.model.usage import Usage

About = Callable[[], Mapping[str, Any]]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at: ``ok`` is true, false or "warn"."""

    name: str
    ok: bool | str
    message: str
    hint: str = ""


class Checks(msgspec.Struct, frozen=True, kw_only=True):
    items: tuple[Check, ...]


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    items: tuple[CatalogueEntry, ...]


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers."""

    version: str
    api: str = "v1"
    pid: int = 0
    state: str = ""
    listen: tuple[str, ...] = ()
    """TCP addresses besides the unix socket."""
    engine: str = ""


def routes(service: Service, live: Live, about: About) -> list[HTTPRouteHandler]:
    """All of them."""
    return [
        _version(about), _schema(), _catalogue(service), _doctor(live), _content(service, live), _cancel(service),
        _probe(service, live), _usage(live),
    ]  # fmt: skip


def _version(about: About) -> HTTPRouteHandler:
    @get("/v1/version", tags=["platform"], summary="Who answers", operation_id="version",
         responses=success(Version, "Version, pid, state directory.") | documented())  # fmt: skip
    async def handler() -> Response[bytes]:
        return encode.json(msgspec.convert(dict(about()), Version))

    return handler


def _schema() -> HTTPRouteHandler:
    @get("/v1/schema", tags=["platform"], summary="Structure of every kind", operation_id="schema",
         responses=success(dict[str, Any], "Fields, types, defaults, and what they mean.") | documented())  # fmt: skip
    async def handler() -> Response[bytes]:
        return encode.json(all_kinds())

    return handler


def _catalogue(service: Service) -> HTTPRouteHandler:
    @get("/v1/catalogue", tags=["images"], summary="Images that can be had", operation_id="catalogue",
         responses=success(Catalogue, "By name.") | documented())  # fmt: skip
    async def handler() -> Response[bytes]:
        known = CatalogueEntry.__struct_fields__
        items = [CatalogueEntry(**{k: v for k, v in entry.items() if k in known}) for entry in service.offered]
        return encode.json(Catalogue(items=tuple(items)))

    return handler


def _doctor(live: Live) -> HTTPRouteHandler:
    @get("/v1/doctor", tags=["platform"], summary="What works here and what does not", operation_id="doctor",
         responses=success(Checks, "Checks of this host.") | documented())  # fmt: skip
    async def handler() -> Response[bytes]:
        return encode.json(Checks(items=tuple(Check(**check) for check in await live.doctor())))

    return handler


def _usage(live: Live) -> HTTPRouteHandler:
    @get("/v1/usage", tags=["platform"], summary="Who uses what on this host", operation_id="usage",
         responses=success(Usage, "Host, projects, and VMs that have a process.") | documented())  # fmt: skip
    async def handler() -> Response[bytes]:
        return encode.json(await live.usage())

    return handler


@dataclass
class Upload(Operation):
    """An operation whose body is bytes."""

    def __post_init__(self) -> None:
        binary = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
        self.request_body = RequestBody(
            content={"application/octet-stream": OpenAPIMediaType(schema=binary)}, description="The image's bytes."
        )


def _content(service: Service, live: Live) -> HTTPRouteHandler:
    @put(
        "/v1/images/{ref:str}/content", tags=["images"], summary="Send the bytes of an upload", status_code=202,
        operation_id="upload_image", operation_class=Upload, request_max_body_size=None,
        responses=success(ImagesAccepted, "Stored; the task says how its check goes.", 202) | documented(),
    )  # fmt: skip
    async def handler(request: Request[Any, Any, Any], ref: Ref, project: Project = "default") -> Response[bytes]:
        image, task = await service.upload_target(ref, project=project)
        await live.receive(image.meta.id, request.stream(), _length(request))
        items = (await service.objects.get(Image, image.meta.id),)
        return encode.json(ImagesAccepted(items=items, tasks=(await service.objects.get(Task, task.meta.id),)), 202)

    return handler


def _length(request: Request[Any, Any, Any]) -> int | None:
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Invalid([Problem("Content-Length", "is no number of bytes")], code="malformed")
    return int(text)


def _cancel(service: Service) -> HTTPRouteHandler:
    @post("/v1/tasks/{ref:str}/cancel", tags=["tasks"], summary="Cancel a task", operation_id="cancel_task",
          status_code=200, responses=success(Task, "The task as it is now.") | documented())  # fmt: skip
    async def handler(ref: Ref, project: Project = "default") -> Response[bytes]:
        return encode.one(await service.cancel_task(ref, project=project))

    return handler


def _probe(service: Service, live: Live) -> HTTPRouteHandler:
    @post("/v1/hosts/{ref:str}/probe", tags=["hosts"], summary="Find out again what works", operation_id="probe_host",
          status_code=200, responses=success(Host, "The host as it is now.") | documented())  # fmt: skip
    async def handler(ref: Ref) -> Response[bytes]:
        host = await service.objects.find(Host, ref)
        await live.probe()
        return encode.one(await service.objects.get(Host, host.meta.id))

    return handler
