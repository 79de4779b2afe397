"""The frame that all kinds share."""

from __future__ import annotations

from typing import ClassVar

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record whose unknown fields are an error (a misspelt field is never ignored)."""


class Meta(Struct, frozen=True, kw_only=True):
    """Who an object is. Written by the API and the store, never by users except ``name`` and ``labels``."""

    id: str
    """UUID, for ever."""
    name: str
    """Unique in its project and kind; may not change."""
    project: str = "default"
    labels: dict[str, str] = {}
    revision: int = 0
    """Store revision of the last change: the ETag."""
    generation: int = 1
    """Rises with each change of the spec."""
    created: float = 0.0
    """Wall time, seconds since 1970."""
    deleted: float | None = None
    """Wall time at which deletion was asked for; the object goes when everything it owned is gone."""


class Resource(Struct, frozen=True, kw_only=True):
    """Base of all kinds; each adds ``spec`` and, where something is seen, ``status``."""

    KIND: ClassVar[str] = ""
    meta: Meta
