"""Listings: filters, pages, and the answer types by kind."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import msgspec

from corral.errors import Invalid, Problem
from corral.model.base import Resource
from corral.model.kinds import Kind
from corral.model.strict import shown

DEFAULT_LIMIT = 500
MAX_LIMIT = 1000
MAX_LABELS = 16
"""Filters of one request."""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Objects sorted by name, as of ``revision``; ``next`` is the cursor of the rest, null when this is all."""

    items: tuple[Any, ...]
    revision: int
    next: str | None = None


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """What a cursor says: the last object before the page."""

    kind: str
    name: str
    created: float
    id: str


@cache
def page_type(kind: Kind) -> type[Page]:
    """The page of a kind, for OpenAPI and for encoding."""
    items: Any = tuple[kind.cls, ...]  # type: ignore[name-defined]
    fields: list[Any] = [("items", items), ("revision", int), ("next", str | None, None)]
    made = msgspec.defstruct(f"{kind.cls.__name__}Page", fields, frozen=True, kw_only=True, module=__name__)
    made.__doc__ = Page.__doc__
    return made  # type: ignore[return-value]


def page_of(
    kind: Kind, items: Sequence[Resource], revision: int, *, labels: Iterable[str], phase: str | None, name: str | None,
    limit: int | None, cursor: str | None,
) -> Page:  # fmt: skip
    """The page that was asked for. Raises Invalid for a filter, limit or cursor that means nothing."""
    wanted = _labels(list(labels))
    size = DEFAULT_LIMIT if limit is None else limit
    if not 1 <= size <= MAX_LIMIT:
        raise Invalid([Problem("limit", f"{size} is out of range", f"1 to {MAX_LIMIT}")])
    after = _read(kind, cursor) if cursor else None
    found: list[Resource] = []
    more = False
    for item in items:
        if after is not None and (item.meta.name, item.meta.created, item.meta.id) <= after:
            continue
        if not _matches(item, wanted, phase, name):
            continue
        if len(found) == size:
            more = True
            break
        found.append(item)
    return page_type(kind)(items=tuple(found), revision=revision, next=_write(kind, found[-1]) if more else None)


def _matches(item: Resource, labels: dict[str, str | None], phase: str | None, name: str | None) -> bool:
    if name is not None and item.meta.name != name:
        return False
    if phase is not None and str(_phase(item)) != phase:
        return False
    return all(
        key in item.meta.labels and (value is None or item.meta.labels[key] == value) for key, value in labels.items()
    )


def _phase(item: Resource) -> Any:
    status = getattr(item, "status", None)
    return getattr(status, "phase", None) or getattr(status, "state", "")


def _labels(filters: list[str]) -> dict[str, str | None]:
    if len(filters) > MAX_LABELS:
        raise Invalid([Problem("label", f"{len(filters)} filters", f"at most {MAX_LABELS}")])
    found: dict[str, str | None] = {}
    for text in filters:
        key, joined, value = text.partition("=")
        if not key:
            raise Invalid([Problem("label", f"{shown(text)} is no filter", "KEY=VALUE or KEY")])
        found[key] = value if joined else None
    return found


def _write(kind: Kind, last: Resource) -> str:
    mark = Mark(kind.name, last.meta.name, last.meta.created, last.meta.id)
    return base64.urlsafe_b64encode(msgspec.json.encode(mark)).decode().rstrip("=")


def _read(kind: Kind, cursor: str) -> tuple[str, float, str]:
    try:
        raw = base64.b64decode(cursor.encode() + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        mark = msgspec.json.decode(raw, type=Mark)
    except (binascii.Error, ValueError, msgspec.MsgspecError, UnicodeError):
        mark = None
    if mark is None or mark.kind != kind.name:
        raise Invalid(
            [Problem("cursor", f"{shown(cursor)} is no cursor of this listing", "what an answer gave as next")]
        )
    return mark.name, mark.created, mark.id
