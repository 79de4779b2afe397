"""The structure of every kind, read from the model itself: fields, types, defaults and what is said about them.

The sentences are the strings under the fields; Python forgets them, so they are read from the source.
"""

from __future__ import annotations

import ast
import enum
import inspect
from collections.abc import Hashable
from functools import cache
from typing import Any, cast

import msgspec

from corral.errors import NotFound
from corral.model.kinds import KINDS, kind_of
from corral.model.shape import describe


@cache
def sentences(cls: Hashable) -> dict[str, str]:
    """Field → the string below it, base classes included; empty where there is no source (``python -OO``, frozen)."""
    found: dict[str, str] = {}
    assert isinstance(cls, type)
    for part in reversed(cls.__mro__):
        if not part.__module__.startswith("corral."):
            continue
        try:
            tree = ast.parse(inspect.getsource(part)).body[0]
        except (OSError, TypeError):
            continue
        assert isinstance(tree, ast.ClassDef)
        for line, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                text = after.value
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[line.target.id] = " ".join(text.value.split())
    return found


def structure_of(cls: type[Any]) -> dict[str, Any]:
    """A struct as a tree: ``description``, and ``fields``: name, type, required, default, description, fields."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    about = sentences(cast(Hashable, cls))
    return {
        "description": " ".join((cls.__doc__ or "").split()),
        "fields": [_field(field, about.get(field.name, "")) for field in info.fields],
    }


def _field(field: msgspec.inspect.Field, about: str) -> dict[str, Any]:
    told: dict[str, Any] = {"name": field.encode_name, "type": describe(field.type), "required": field.required}
    told |= {"default": None if field.required else _default(field), "description": about}
    inner = _struct_in(field.type)
    if inner is not None:
        told |= structure_of(inner) | ({"description": about} if about else {})
    return told


def _default(field: msgspec.inspect.Field) -> Any:
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(value, enum.Enum):
        return value.value
    return msgspec.to_builtins(value)


def _struct_in(kind: msgspec.inspect.Type) -> type[Any] | None:
    if isinstance(kind, msgspec.inspect.StructType):
        return kind.cls
    if isinstance(kind, msgspec.inspect.VarTupleType | msgspec.inspect.ListType):
        return _struct_in(kind.item_type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return next((found for part in kind.types if (found := _struct_in(part)) is not None), None)
    return None


def all_kinds() -> dict[str, Any]:
    """Every kind: plural, summary, whether it lives in a project, and its structure."""
    return {
        kind.name: {
            "plural": kind.plural, "summary": kind.summary, "scoped": kind.scoped, "writable": kind.writable,
            **structure_of(kind.cls),
        }
        for kind in KINDS.values()
    }  # fmt: skip


def lookup(path: str) -> dict[str, Any]:
    """The part of the structure that a path like ``vm.spec.cpu`` names. Raises NotFound, saying what there is."""
    words = path.split(".")
    kind = kind_of(words[0])
    here: dict[str, Any] = {"name": kind.name, "type": "a JSON object", **structure_of(kind.cls)}
    for number, word in enumerate(words[1:], 1):
        fields = {field["name"]: field for field in here.get("fields", ())}
        if word not in fields:
            inside = ", ".join(fields) or "nothing"
            raise NotFound(f"{'.'.join(words[:number])} has no field {word!a}", hint=f"it has: {inside}")
        here = fields[word]
    return here
