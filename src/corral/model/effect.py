"""When a changed field of a VM's spec takes effect: at once, at the next boot, never. Pure, on specs as JSON trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from corral.model.patch import public

LIVE = (
    "cpu.burst",
    "cpu.weight", "cpu.limit", "cpu.reserve", "disk.root.iops", "disk.root.bandwidth", "disk.root.iops_burst",
    "disk.root.bandwidth_burst", "disk.root.burst_s", "memory.reserve", "memory.weight", "restart", "on_hang", "power",
    "ephemeral",
)  # fmt: skip
"""Fields that a running VM follows within a second or two; its hardware is what it was started with."""
Effect = Literal["live", "restart", "now", "impossible"]


class Changed(NamedTuple):
    """One field that changed, by the path that people write (:mod:`corral.model.patch`).

    ``effect``: ``live``, ``restart`` (at the next boot), ``now`` (it does not run), or ``impossible`` (``why`` says).
    """

    field: str
    before: Any
    after: Any
    effect: Effect
    why: str = ""


def effects(
    before: Mapping[str, Any], after: Mapping[str, Any], *, runs: bool, memory: int | None = None,
    refused: Mapping[str, str] | None = None,
) -> list[Changed]:  # fmt: skip
    """What changed between two specs, by field. ``memory``: bytes that the hardware was started with. ``refused``:
    field → why it cannot be so."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    why = refused or {}
    return [
        Changed(
            field, old.get(field), new.get(field), _effect(field, new.get(field), runs, memory, why), why.get(field, "")
        )
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]


def _effect(field: str, wanted: Any, runs: bool, memory: int | None, refused: Mapping[str, str]) -> Effect:
    if field in refused:
        return "impossible"
    if not runs:
        return "now"
    if field == "memory.size":  # its balloon gives back a part of what the hardware has, and can give no more
        return "live" if memory is not None and wanted <= memory else "restart"
    return "live" if field in LIVE else "restart"


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, where)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            yield from _leaves({str(number): item for number, item in enumerate(value)}, where)
        else:
            yield public(where), value
