"""Many starts of guests as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from peers.started import Started

MIB = 1 << 20


def middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def high(values: Iterable[float | None]) -> float | None:
    """What nine of ten stay below."""
    known = sorted(value for value in values if value is not None)
    return known[round(0.9 * (len(known) - 1))] if known else None


def summary(found: dict[str, list[Started]], base: str) -> dict[str, dict[str, Any]]:
    """For each arm the median and p90 of each figure, and how many times the boot ``base`` took as long."""
    boot = middle(one.answer for one in found.get(base, []))
    rows: dict[str, dict[str, Any]] = {}
    for arm, ones in found.items():
        row: dict[str, Any] = {"starts": len(ones)}
        for field in Started._fields:
            values = [getattr(one, field) for one in ones]
            row[field] = middle(values)
            row[f"{field}_p90"] = high(values)
        for field in ("answer", "identity", "whole"):
            row[f"{field}_ratio"] = boot / row[field] if boot and row[field] else None
        rows[arm] = row
    return rows


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows under the first of them, as Markdown."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |", flush=True)


HEAD = ("arm", "starts", "answers s", "p90", "× boot", "identity s", "p90", "× boot", "command s", "p90", "CPU s", "own MiB")  # fmt: skip


def shown(arms: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of a table of :func:`summary`."""

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [list(HEAD)]
    for arm, row in arms.items():
        cells = [arm, str(row["starts"])]
        for field in ("answer", "identity"):
            cells += [text(row[field], ".3f"), text(row[f"{field}_p90"], ".3f"), text(row[f"{field}_ratio"], ".1f")]
        cells += [text(row["whole"], ".3f"), text(row["whole_p90"], ".3f"), text(row["cpu"], ".2f")]
        cells.append("" if row["own"] is None else f"{row['own'] / MIB:.0f}")
        rows.append(cells)
    return rows
