"""The answer on stdout: a table for people, JSON, or names for scripts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from corral.cli.failures import clean
from corral.units import format_duration, format_size

if TYPE_CHECKING:
    from corral.model.kinds import Column, Kind

Object = dict[str, Any]
"""An object as the API gives it."""

_COLOURS = {
    "running": "32", "ready": "32", "done": "32", "starting": "33", "stopping": "33", "pending": "33", "paused": "36",
    "fetching": "33", "building": "33", "unresponsive": "31", "error": "31", "failed": "31", "unknown": "31",
    "down": "31",
}  # fmt: skip


def print_list(kind: Kind, items: Sequence[Object], output: str) -> None:
    """Several objects: an array, a name a line, or a table."""
    if output == "json":
        print_json(list(items))
    elif output == "name":
        print("".join(f"{clean(name_of(item))}\n" for item in items), end="")
    else:
        columns = [c for c in kind.columns if output == "wide" or not c.wide]
        scopes = {item["meta"].get("project") for item in items} if kind.scoped else set()
        if len(scopes) > 1:
            from corral.model.kinds import Column

            columns.insert(0, Column("PROJECT", "meta.project"))
        print(table([c.title for c in columns], [[cell(item, c) for c in columns] for item in items]))


def print_one(item: Object, output: str, text: str) -> None:
    """One object: itself as JSON, its name, or ``text`` for people."""
    if output == "json":
        print_json(item)
    else:
        print(clean(name_of(item)) if output == "name" else text)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def name_of(item: Object) -> str:
    """What a script calls it: the name; tasks and events have only ids."""
    meta = item["meta"]
    return str(meta["id"] if item.get("kind") in ("task", "event") else meta["name"])


def at(item: Object, path: str) -> Any:
    """The value at a dotted path; None where something on the way is missing."""
    value: Any = item
    for word in path.split("."):
        value = value.get(word) if isinstance(value, dict) else None
    return value


def cell(item: Object, column: Column) -> str:
    """One value as the table shows it; ``-`` for nothing."""
    value = at(item, column.path)
    return shown(value, column.form) or "-"


def shown(value: Any, form: str = "") -> str:
    """A value in one of the forms of :class:`corral.model.kinds.Column`."""
    if value is None or value == "":
        return ""
    if form == "size":
        return format_size(value) if value else ""
    if form == "age":
        return format_duration(max(0.0, time.time() - value)) if value else ""
    if form == "time":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if form == "ports":
        return ",".join(port(p) for p in value if p.get("purpose") != "ssh")
    if form == "step":
        return _step(value)
    if isinstance(value, list):
        return ",".join(shown(v) for v in value)
    if isinstance(value, dict):
        return port(value) if {"host", "guest"} <= value.keys() else json.dumps(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(str(value))


def port(forward: Object) -> str:
    """``8080:80/udp``; the address only when it is not loopback, the protocol only when it is not tcp."""
    address = "" if forward.get("address") in ("127.0.0.1", None) else f"{forward['address']}:"
    protocol = "" if forward.get("protocol", "tcp") == "tcp" else f"/{forward['protocol']}"
    return f"{address}{forward['host']}:{forward['guest']}{protocol}"


def _step(steps: list[Object]) -> str:
    """The step that a task is at: the last one that began."""
    begun = [s for s in steps if s.get("state") != "pending"]
    return clean(str(begun[-1]["name"])) if begun else ""


def coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart. On a terminal the last one is cut to fit, and states are coloured."""
    widths = [max(len(r[n]) for r in (titles, *rows)) for n in range(len(titles))]
    limit = os.get_terminal_size(1).columns if sys.stdout.isatty() else None
    colour = coloured()
    lines = []
    for number, row in enumerate((titles, *rows)):
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        if limit is not None and number:
            room = limit - sum(len(c) + 2 for c in cells[:-1])
            if 8 <= room < len(row[-1]):
                cells[-1] = row[-1][: room - 1] + "…"
        cells[-1] = cells[-1].rstrip()
        if colour and number:
            cells = [f"\x1b[{_COLOURS[c.strip()]}m{c}\x1b[0m" if c.strip() in _COLOURS else c for c in cells]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def outline(item: Object, forms: dict[str, str]) -> str:
    """All fields of an object that hold something, one a line, indented as they are nested."""
    lines: list[str] = []

    def walk(value: Object, depth: int, path: str) -> None:
        for key, inner in value.items():
            where = f"{path}.{key}" if path else key
            indent = "  " * depth
            if isinstance(inner, dict):
                lines.append(f"{indent}{clean(key)}:")
                walk(inner, depth + 1, where)
                if lines[-1] == f"{indent}{clean(key)}:":
                    lines.pop()  # nothing in it holds anything
            elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
                lines.append(f"{indent}{key}:")
                for entry in inner:
                    lines.append(f"{indent}  - " + " ".join(f"{k}={shown(v)}" for k, v in entry.items() if shown(v)))
            elif text := shown(inner, forms.get(where, "")):
                lines.append(f"{indent}{clean(key)}: {text}")

    walk(item, 0, "")
    return "\n".join(lines)
