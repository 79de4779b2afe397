"""Answers as bytes: encoded once, with the ETag of the object."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Response

from corral.errors import Invalid, Problem
from corral.model.base import Resource
from corral.model.strict import shown

JSON = "application/json"
_encoder = msgspec.json.Encoder()


def json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    """A JSON answer."""
    return Response(_encoder.encode(content), status_code=status, media_type=JSON, headers=headers)


def one(obj: Resource, status: int = 200) -> Response[bytes]:
    """An object, with its ETag."""
    return json(obj, status, {"ETag": etag(obj)})


def etag(obj: Resource) -> str:
    return f'"{obj.meta.revision}"'


def revision(if_match: str | None) -> int | None:
    """The revision that an ``If-Match`` header asks for; None for none and ``*``. Raises Invalid ``malformed``."""
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Invalid([Problem("If-Match", f"{shown(if_match)} is no ETag of ours", '"REVISION"')], code="malformed")
    return int(text)
