"""Quantities and pairs as flags take them. A wrong value is a usage error that says what would be right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from corral.errors import Invalid
from corral.units import parse_duration, parse_share, parse_size

if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # older releases of click are not generic


class Quantity(_Type):
    """A flag's value read by one of the parsers of :mod:`corral.units`."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except Invalid as error:
            problem = error.problems[0]
            wanted = f"; expected {problem.expected}" if problem.expected else ""
            self.fail(f"{problem.message}{wanted}", param, ctx)


SIZE = Quantity("size", parse_size)
SHARE = Quantity("share", parse_share)
DURATION = Quantity("duration", parse_duration)


def pairs(words: Iterable[str], flag: str) -> dict[str, str]:
    """``K=V`` words as a dict. Raises a usage error that names the flag."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{word!r} is not K=V", param_hint=flag)
        found[key] = value
    return found


class Given(NamedTuple):
    """What a flag said: ``none`` is a value, and not the same as a flag that was not given."""

    value: Any


class OrNone(_Type):
    """A value of another type, or the word ``none``; as :class:`Given`."""

    def __init__(self, quantity: _Type) -> None:
        self.name, self._quantity = quantity.name, quantity

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Given:
        if isinstance(value, Given):
            return value
        return Given(None if value == "none" else self._quantity.convert(value, param, ctx))
