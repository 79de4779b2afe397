"""Routes of VMs beyond what all kinds have: power, log, explain, guest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, cast

from litestar import Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody, QueryParameter
from litestar.response import Stream

from corral.api import encode
from corral.api.bodies import Explanation, Happened
from corral.api.kinds import Flag, Key, Project, Ref, TaskAccepted, VmsAccepted, success
from corral.api.live import Live
from corral.api.problems import documented
from corral.api.request import ForkBody, PowerBody
from corral.api.service import VERBS, Service
from corral.errors import CorralError
from corral.guest.protocol import GuestInfo
from corral.model import Event, Vm
from corral.scheduler.explain import explain, summary

MAX_TAIL = 1 << 20
EVENTS = 5
"""Told with an explanation; ``/v1/events`` has them all."""
TEXT = "text/plain; charset=utf-8"
Tail = Annotated[int, QueryParameter(ge=0, le=MAX_TAIL, description="Bytes from the end.")]


def routes(service: Service, live: Live) -> list[HTTPRouteHandler]:
    """All of them."""
    own = [_fork(service), _log(service, live), _explain(service, live), _guest(service, live)]
    return [*(_power(verb, service) for verb in VERBS), *own]


def _power(verb: str, service: Service) -> HTTPRouteHandler:
    async def handler(
        ref: Ref, data: JSONBody[PowerBody | None] = None, project: Project = "default", idempotency_key: Key = None
    ) -> Response[bytes]:
        tree = None if data is None else data.tree
        task = await service.power(verb, ref, tree, project=project, key=idempotency_key or "")
        return encode.json(TaskAccepted(task=task), 202)

    handler.__name__ = handler.__qualname__ = f"{verb}_vm"
    return post(
        f"/v1/vms/{{ref:str}}/{verb}", tags=["vms"], summary=f"{verb.capitalize()} a VM", operation_id=f"{verb}_vm",
        status_code=202, responses=success(TaskAccepted, "The task says how far it is.", 202) | documented(),
    )(handler)  # fmt: skip


def _fork(service: Service) -> HTTPRouteHandler:
    @post(
        "/v1/vms/{ref:str}/fork", tags=["vms"], summary="Fork a running VM", operation_id="fork_vm", status_code=202,
        responses=success(VmsAccepted, "The forks; the tasks say how far they are.", 202) | documented(),
    )  # fmt: skip
    async def handler(
        ref: Ref, data: JSONBody[ForkBody | None] = None, project: Project = "default", idempotency_key: Key = None
    ) -> Response[bytes]:
        tree = {} if data is None else data.tree
        return encode.json(await service.fork(ref, tree, project=project, key=idempotency_key or ""), 202)

    return handler


def _log(service: Service, live: Live) -> HTTPRouteHandler:
    @get(
        "/v1/vms/{ref:str}/log", tags=["vms"], summary="The serial log", operation_id="vm_log",
        responses=success(str, "Its end; with follow=true, then whatever comes.", media=TEXT) | documented(),
    )  # fmt: skip
    async def handler(
        ref: Ref, project: Project = "default", tail: Tail = 64 << 10, follow: Flag = False
    ) -> Response[Any]:
        vm = await service.objects.find(Vm, ref, project)
        text = await live.serial_log(vm.meta.id, tail)
        if not follow:
            return Response(text, media_type=TEXT)
        return cast("Response[Any]", Stream(_following(live, vm.meta.id, tail), media_type=TEXT))

    return handler


async def _following(live: Live, vm_id: str, tail: int) -> AsyncIterator[bytes]:
    """The tail that was asked for, then what comes. A stream that has begun can only end: errors are its end."""
    first = True
    try:
        async with aclosing(cast(Any, live.follow_log(vm_id))) as chunks:
            async for chunk in chunks:
                data = bytes(chunk)
                if first:
                    data, first = (data[-tail:] if tail else b""), False
                if data:
                    yield data
    except CorralError:
        return


def _explain(service: Service, live: Live) -> HTTPRouteHandler:
    @get(
        "/v1/vms/{ref:str}/explain", tags=["vms"], summary="Why it is slow, and why it is where it is",
        operation_id="explain_vm",
        responses=success(Explanation, "Findings with numbers, and a verdict of every host.") | documented(),
    )  # fmt: skip
    async def handler(ref: Ref, project: Project = "default") -> Response[bytes]:
        vm = await service.objects.find(Vm, ref, project)
        usage = await live.usage(lately=True)
        return encode.json(
            Explanation(
                vm=vm.meta.name, phase=str(vm.status.phase), reason=vm.status.reason, host=vm.status.host,
                summary=summary(vm, usage), period_s=usage.host.period_s, findings=explain(vm, usage),
                events=await _happened(service, vm), **await service.judge(vm),
            )
        )  # fmt: skip

    return handler


async def _happened(service: Service, vm: Vm) -> tuple[Happened, ...]:
    found = [event.spec for event in (await service.objects.list(Event, vm.meta.project)).items]
    mine = sorted((one for one in found if one.about_id == vm.meta.id), key=lambda one: -one.at)[:EVENTS]
    return tuple(Happened(at=e.at, reason=e.reason, message=e.message, severity=e.severity) for e in mine)


def _guest(service: Service, live: Live) -> HTTPRouteHandler:
    @get(
        "/v1/vms/{ref:str}/guest", tags=["vms"], summary="What the guest says about itself", operation_id="vm_guest",
        responses=success(GuestInfo, "Untrusted text of the guest's.") | documented(),
    )  # fmt: skip
    async def handler(ref: Ref, project: Project = "default") -> Response[bytes]:
        vm = await service.objects.find(Vm, ref, project)
        return encode.json(await live.guest_info(vm.meta.id))

    return handler
