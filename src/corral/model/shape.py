"""Fits a JSON tree to a type and tells everything that does not fit, each with its field.

msgspec's own decoder stops at the first error; people want to see all of them at once. What does not fit is replaced by
a stand-in, so that the meaning of the rest can still be checked (:mod:`corral.model.validate`).
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

from corral.errors import Problem
from corral.model.strict import shown

T = TypeVar("T")
MAX_ITEMS = 1000
"""Entries of any list or mapping; a later check may ask for fewer."""
MAX_PROBLEMS = 50
"""Told at once: more would help nobody."""
PLATFORMS = frozenset({"kind", "meta", "status", "id", "revision", "generation", "created", "deleted", "host", "epoch"})
"""Fields that exist, and that users do not write."""


def read(cls: type[T], tree: Any, path: str = "") -> tuple[T, list[Problem]]:
    """An object of ``cls`` made of ``tree``, and what was wrong (then the object holds stand-ins)."""
    problems: list[Problem] = []
    found: T = _read(_info(cast(Hashable, cls)), tree, path, problems)
    return found, problems[:MAX_PROBLEMS]


@cache
def _info(cls: Hashable) -> inspect.Type:
    return inspect.type_info(cls)


def _read(kind: inspect.Type, value: Any, path: str, problems: list[Problem]) -> Any:
    if isinstance(kind, inspect.UnionType):
        if value is None and any(isinstance(t, inspect.NoneType) for t in kind.types):
            return None
        rest = [t for t in kind.types if not isinstance(t, inspect.NoneType)]
        assert len(rest) == 1, f"{path}: the model has only optional unions"
        before = len(problems)
        found = _read(rest[0], value, path, problems)
        return None if len(problems) > before else found
    if isinstance(kind, inspect.StructType):
        return _struct(kind, value, path, problems)
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return _sequence(kind, value, path, problems)
    if isinstance(kind, inspect.DictType):
        return _mapping(kind, value, path, problems)
    if isinstance(kind, inspect.AnyType):
        return value
    return _scalar(kind, value, path, problems)


def _struct(kind: inspect.StructType, value: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, dict):
        problems.append(Problem(path or "body", f"{_name(value)} is not an object", "a JSON object"))
        value = {}
        return _build(kind, {}, path, None)
    fields = {field.encode_name: field for field in kind.fields}
    for name in value:
        if name not in fields and len(problems) < MAX_PROBLEMS:
            problems.append(_unknown(name, fields, path))
    return _build(kind, {name: v for name, v in value.items() if name in fields}, path, problems)


def _build(kind: inspect.StructType, given: dict[str, Any], path: str, problems: list[Problem] | None) -> Any:
    """The struct of what is given. ``problems`` None: it stands in for something wrong that has been told already."""
    values: dict[str, Any] = {}
    for field in kind.fields:
        where = f"{path}.{field.encode_name}" if path else field.encode_name
        if field.encode_name in given:
            before = len(problems or ())
            found = _read(field.type, given[field.encode_name], where, problems if problems is not None else [])
            wrong = len(problems or ()) > before
            if wrong and not field.required and isinstance(found, (str, int, float, type(None))):
                continue  # the default stands in; what holds more keeps the part of it that is right
            values[field.name] = found
        elif field.required:
            if problems is not None:
                problems.append(Problem(where, "is missing", describe(field.type)))
            values[field.name] = _stand_in(field.type)
    return kind.cls(**values)


def _sequence(kind: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, list):
        problems.append(Problem(path, f"{_name(value)} is not a list", "a JSON array"))
        return ()
    if len(value) > MAX_ITEMS:
        problems.append(Problem(path, f"has {len(value)} entries", f"at most {MAX_ITEMS}"))
        return ()
    items = [_read(kind.item_type, item, f"{path}[{number}]", problems) for number, item in enumerate(value)]
    return tuple(items) if isinstance(kind, inspect.VarTupleType) else items


def _mapping(kind: inspect.DictType, value: Any, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, dict):
        problems.append(Problem(path, f"{_name(value)} is not an object", "a JSON object"))
        return {}
    if len(value) > MAX_ITEMS:
        problems.append(Problem(path, f"has {len(value)} entries", f"at most {MAX_ITEMS}"))
        return {}
    return {key: _read(kind.value_type, item, f"{path}.{_key(key)}", problems) for key, item in value.items()}


def _scalar(kind: inspect.Type, value: Any, path: str, problems: list[Problem]) -> Any:
    if isinstance(kind, inspect.BoolType) and isinstance(value, bool):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(kind, inspect.IntType) and number and isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            return value
        problems.append(Problem(path, f"{value} is too large", "a whole number below 2^63"))
        return 0
    if isinstance(kind, inspect.FloatType) and number:
        return float(value)
    if isinstance(kind, inspect.StrType) and isinstance(value, str):
        return value
    if isinstance(kind, inspect.EnumType) and isinstance(value, str) and value in [member.value for member in kind.cls]:
        return kind.cls(value)
    if isinstance(kind, inspect.LiteralType) and isinstance(value, str) and value in kind.values:
        return value
    problems.append(Problem(path, f"{shown(value)} does not fit", describe(kind)))
    return _stand_in(kind)


def _stand_in(kind: inspect.Type) -> Any:
    """Something of the right type, where nothing right was given."""
    if isinstance(kind, inspect.StructType):
        return _build(kind, {}, "", None)
    if isinstance(kind, inspect.EnumType):
        return next(iter(kind.cls))
    if isinstance(kind, inspect.LiteralType):
        return kind.values[0]
    simple: dict[type, Any] = {
        inspect.IntType: 0, inspect.FloatType: 0.0, inspect.StrType: "", inspect.BoolType: False,
        inspect.DictType: {}, inspect.VarTupleType: (), inspect.ListType: [],
    }  # fmt: skip
    return simple.get(type(kind))


def describe(kind: inspect.Type) -> str:
    """A type in words."""
    if isinstance(kind, inspect.UnionType):
        return " or ".join(describe(t) for t in kind.types)
    if isinstance(kind, inspect.EnumType):
        return "one of " + ", ".join(str(member.value) for member in kind.cls)
    if isinstance(kind, inspect.LiteralType):
        return "one of " + ", ".join(str(v) or '""' for v in kind.values)
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return f"a list of {describe(kind.item_type).removeprefix('a ')}"
    words: dict[type, str] = {
        inspect.IntType: "a whole number", inspect.FloatType: "a number", inspect.StrType: "a string",
        inspect.BoolType: "true or false", inspect.NoneType: "null", inspect.DictType: "a JSON object",
        inspect.StructType: "a JSON object", inspect.AnyType: "anything",
    }  # fmt: skip
    return words[type(kind)]


def _unknown(name: str, fields: dict[str, Any], path: str) -> Problem:
    where = f"{path}.{_key(name)}" if path else _key(name)
    if name in PLATFORMS:
        return Problem(where, "is written by the platform, never by a request", f"one of {', '.join(fields)}")
    near = difflib.get_close_matches(name[:64], fields, 1)
    return Problem(where, "there is no such field" + (f"; did you mean {near[0]}?" if near else ""), ", ".join(fields))


def _key(name: str) -> str:
    """A key of the user's as part of a path: plain, or escaped and bounded."""
    return name if 0 < len(name) <= 64 and name.isascii() and name.isprintable() else shown(name)


def _name(value: Any) -> str:
    return {type(None): "null", list: "an array", dict: "an object"}.get(type(value)) or shown(value)


def to_tree(obj: Any) -> Any:
    """The JSON tree of an object."""
    return msgspec.json.decode(msgspec.json.encode(obj))
