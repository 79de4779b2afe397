"""Every error as a problem body (RFC 9457): ours, the framework's, and those that nobody thought of."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec

from corral.api.bodies import ProblemBody
from corral.errors import Bug, CorralError, Invalid, NotFound, Problem, Refused, Unavailable, to_problem

log = structlog.get_logger("api")
MEDIA = "application/problem+json"


def body_of(error: CorralError) -> bytes:
    """The problem body as JSON."""
    return msgspec.json.encode(to_problem(error), enc_hook=str)


def answer(error: CorralError, status: int | None = None, headers: dict[str, str] | None = None) -> Response[bytes]:
    """The response for an error."""
    extra = dict(headers or {})
    told = to_problem(error) | ({"status": status} if status else {})
    if error.http_status in (429, 503):
        extra.setdefault("Retry-After", "1")
    body = msgspec.json.encode(told, enc_hook=str)
    return Response(body, status_code=status or error.http_status, media_type=MEDIA, headers=extra)


def on_corral(_request: Request[Any, Any, Any], error: CorralError) -> Response[bytes]:
    """An error of ours."""
    if isinstance(error, Bug):
        log.error("bug", error=error.message)
    return answer(error)


def on_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """An error of the framework: unknown path or method, a parameter that does not fit, a body that is too large."""
    status = error.status_code
    allowed = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
    if isinstance(error, ValidationException):
        return answer(Invalid(_problems(error), code="malformed"))
    if status == 404:
        return answer(NotFound(f"there is nothing at {request.url.path!a}", hint="see /openapi.json"))
    if status == 405:
        methods = allowed.get("Allow") or allowed.get("allow") or ""
        return answer(Refused(f"{request.method} is not possible here", code="usage", hint=methods), 405, allowed)
    if status == 413:
        return answer(Refused("the body is too large", code="too-large"))
    if status >= 500:
        return on_anything(request, error)
    return answer(Refused(str(error.detail) or "the request cannot be read", code="malformed"), status, allowed)


def on_anything(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A mistake of ours: logged with its traceback, told without."""
    log.exception("request failed", method=request.method, path=request.url.path, exc_info=error)
    told = Bug(f"an error in Corral itself ({type(error).__name__})", hint="please report it, with the daemon's log")
    return answer(told)


def _problems(error: ValidationException) -> list[Problem]:
    found = []
    for item in error.extra if isinstance(error.extra, list) else []:
        if isinstance(item, dict):
            field, message = str(item.get("key", "request")), str(item.get("message", "does not fit"))
            missing = Problem("body", "is missing", "a JSON object")
            found.append(missing if (field, message) == ("data", "'data'") else Problem(field, message))
    return found or [Problem("body", "is missing or does not fit")]


def handlers() -> dict[Any, Any]:
    """For ``Litestar(exception_handlers=…)``."""
    return {CorralError: on_corral, HTTPException: on_http, Exception: on_anything}


_TITLES = {
    400: "The request cannot be read", 403: "Not allowed", 404: "Not found", 409: "Refused in the present state",
    410: "That revision is gone", 412: "The object changed meanwhile", 413: "Too large", 422: "Some fields are wrong",
    429: "Too many requests", 500: "An error in Corral itself", 502: "The guest or the hypervisor failed",
    503: "Not available now", 504: "Timed out",
}  # fmt: skip


def documented(*without: int) -> dict[int, ResponseSpec]:
    """Every error as OpenAPI shows it."""
    return {
        status: ResponseSpec(ProblemBody, generate_examples=False, description=title, media_type=MEDIA)
        for status, title in _TITLES.items()
        if status not in without
    }


__all__ = ["MEDIA", "Unavailable", "answer", "body_of", "documented", "handlers"]
