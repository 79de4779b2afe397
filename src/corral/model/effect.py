"""When a changed field of a VM's spec takes effect: at once, or at the next boot. Pure, on specs as JSON trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

LIVE = ("cpu.weight", "cpu.limit", "cpu.reserve", "restart", "power")
"""Fields that a running VM follows within a second or two; its hardware is what it was started with."""
Effect = Literal["live", "restart", "now"]


class Changed(NamedTuple):
    """One field that changed. ``effect``: ``live``, ``restart`` (at the next boot), or ``now`` (it does not run)."""

    field: str
    before: Any
    after: Any
    effect: Effect


def effects(before: Mapping[str, Any], after: Mapping[str, Any], *, runs: bool) -> list[Changed]:
    """What changed between two specs, by field."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        Changed(field, old.get(field), new.get(field), _effect(field, runs))
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]


def _effect(field: str, runs: bool) -> Effect:
    if not runs:
        return "now"
    return "live" if field in LIVE else "restart"


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, where)
        else:
            yield where, value
