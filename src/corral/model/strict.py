"""JSON as strangers send it: read strictly, with a sentence for everything that is wrong.

Duplicate keys, NaN, numbers without bound, lone surrogates, deep nesting and bad UTF-8 are refused here, so that
nothing behind this door has to think of them. Next: :mod:`corral.model.shape` fits the tree to a type.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from corral.errors import Invalid, Problem, Refused

MAX_BODY = 1 << 20
"""Bytes of a JSON body: sixteen times the largest user data."""
MAX_DEPTH = 32
"""Nesting: specs are at most 6 deep."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(body: bytes) -> Any:
    """The tree in ``body``. Raises :class:`Invalid` ``malformed``, or :class:`Refused` ``too-large``."""
    if len(body) > MAX_BODY:
        raise Refused(f"the body has {len(body)} bytes", code="too-large", hint=f"at most {MAX_BODY}")
    if _depth(body) > MAX_DEPTH:
        _malformed(f"the JSON is nested more than {MAX_DEPTH} deep")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        _malformed(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}")
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float, parse_int=_int)
    except json.JSONDecodeError as error:
        _malformed(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    if _SURROGATE.search(body):
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _malformed("the body holds half of a surrogate pair, which is no character")
    return tree


def _malformed(message: str, field: str = "body") -> NoReturn:
    raise Invalid([Problem(field, message)], code="malformed")


def _depth(body: bytes) -> int:
    """Deepest nesting; counted before parsing, because a parser would run out of stack. Stops at the limit."""
    depth = deepest = 0
    for match in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if match[0] in b"[{" else -1
        if depth > deepest:
            deepest = depth
            if deepest > MAX_DEPTH:
                break
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        _malformed(
            f"the key {shown(double)} stands twice in one object", double[:100].encode("ascii", "replace").decode()
        )
    return found


def _constant(text: str) -> NoReturn:
    _malformed(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _malformed(f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 20:
        _malformed(f"the number {text[:40]} is too large")
    return int(text)


def shown(value: object) -> str:
    """A user's value as it may stand in a message: quoted, escaped, bounded."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..." + (text[0] if text[0] in "'\"" else "")
