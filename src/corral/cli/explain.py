"""``corral explain vm.spec.cpu``: fields, types, defaults and units of any object. The model itself is the source."""

from __future__ import annotations

from typing import Any

import click

from corral.cli.command import Command
from corral.cli.output import print_json, table
from corral.cli.session import Session
from corral.model.kinds import KINDS
from corral.model.patch import keys
from corral.units import MIB, format_size


@click.command("explain", cls=Command)
@click.argument("path", default="")
@click.pass_obj
def explain(session: Session, path: str) -> None:
    """Print the fields, types, defaults and units of an object: corral explain vm.spec.cpu"""
    from corral.model.schema import lookup

    words = [word for word in path.replace("[", ".").replace("]", "").split(".") if word and not word.isdigit()]
    if words[:2] == ["vm", "spec"] and len(words) > 2:
        words[2:] = keys(".".join(words[2:]))
    if words:
        _print(".".join(words), lookup(".".join(words)), session.output)
    elif session.output == "json":
        print_json([{"kind": kind.name, "summary": kind.summary} for kind in KINDS.values()])
    elif session.output == "name":
        print("\n".join(KINDS))
    else:
        print(table(("KIND", "WHAT IT IS"), [(kind.name, kind.summary) for kind in KINDS.values()]))


def _print(path: str, here: dict[str, Any], output: str) -> None:
    fields = here.get("fields", [])
    if output == "json":
        print_json({"path": path, **here})
        return
    if output == "name":
        print("\n".join(f"{path}.{field['name']}" for field in fields) or path)
        return
    default = default_of(here)
    print(f"{path}: {_type(here)}" + (f", default {default}" if default not in ("", "required") else ""))
    if here.get("description"):
        print(f"  {_plain(here['description'])}")
    if fields:
        rows = [(f["name"], _type(f), default_of(f) or "-", _plain(f["description"])) for f in fields]
        print("\n" + table(("FIELD", "TYPE", "DEFAULT", "WHAT IT IS"), rows))


def _type(field: dict[str, Any]) -> str:
    return str(field["type"]).replace("a JSON object", "an object")


def _plain(text: str) -> str:
    return text.replace("``", "")


def default_of(field: dict[str, Any]) -> str:
    """A default as people read it: sizes with their unit, nothing for objects and empty values."""
    value = field.get("default")
    if field.get("required"):
        return "required"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value in (None, "") or isinstance(value, dict | list):
        return ""
    if isinstance(value, int) and value >= MIB:
        return f"{value} ({format_size(value)})"
    return str(value)
