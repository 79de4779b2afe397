"""``corral vm set``, ``project set`` and ``host set``: change a spec, and say when each change takes effect."""

from __future__ import annotations

import copy
from typing import Any

import click

from corral.cli.command import Command
from corral.cli.failures import clean
from corral.cli.launch import assign
from corral.cli.output import Object, print_json, table
from corral.cli.session import Session
from corral.errors import Invalid
from corral.model.effect import Changed, effects
from corral.model.patch import keys, merge, public

OFF = ("stopped", "error", "pending")
"""Phases in which a VM has no hardware that a change would have to wait for."""
WHEN = {"live": "at once", "restart": "after a restart", "now": "at once", "impossible": "impossible"}

arguments: list[click.Parameter] = [
    click.Argument(["name"]),
    click.Argument(["changes"], nargs=-1, required=True, metavar="KEY=VALUE..."),
    click.Option(["--dry-run"], is_flag=True, help="Show what would change and when it takes effect; change nothing."),
]


@click.command("set", cls=Command)
@click.pass_obj
def set_vm(session: Session, name: str, changes: tuple[str, ...], dry_run: bool) -> int:
    """Change a VM, running or not. Keys are paths into the spec: `corral explain vm.spec`.

    \b
    corral vm set web cpu.weight=400
    corral vm set web cpu.limit=50% cpu.reserve=0.2
    corral vm set web disk.root.iops=500 disk.root.bandwidth=10M
    corral vm set web cpu.limit=none memory.size=1G --dry-run
    """
    before = session.get("vm", name)
    runs = before["status"]["phase"] not in OFF
    memory = before["status"]["memory"]
    try:
        after = change(session, "vm", before, changes, dry_run=dry_run)
    except Invalid as error:
        after = {**before, "spec": merge(before["spec"], assigned(before, changes))}
        refused = {public(problem.field): problem.message for problem in error.problems}
        found = effects(before["spec"], after["spec"], runs=runs, memory=memory, refused=refused)
        if not dry_run or not refused.keys() <= {one.field for one in found}:
            raise  # what is wrong is no field of theirs: a burst that the new limit goes beyond
        show(session, after, found, dry_run=True)
        return error.exit_status
    found = effects(before["spec"], after["spec"], runs=runs, memory=memory)
    show(session, after, found, dry_run=dry_run)
    return 0


@click.command("set", cls=Command)
@click.pass_obj
def set_project(session: Session, name: str, changes: tuple[str, ...], dry_run: bool) -> None:
    """Change a project: what all its VMs get together.

    \b
    corral project set default cpu_weight=200 cpu_limit=1.5
    """
    before = session.get("project", name)
    after = change(session, "project", before, changes, dry_run=dry_run)
    show(session, after, effects(before["spec"], after["spec"], runs=False), dry_run=dry_run)


@click.command("set", cls=Command)
@click.pass_obj
def set_host(session: Session, name: str, changes: tuple[str, ...], dry_run: bool) -> None:
    """Change a host: what its VMs may take together.

    \b
    corral host set HOST memory_budget=16G memory_overcommit=1.5
    """
    before = session.get("host", name)
    after = change(session, "host", before, changes, dry_run=dry_run)
    show(session, after, effects(before["spec"], after["spec"], runs=False), dry_run=dry_run)


set_vm.params += arguments
set_project.params += arguments
set_host.params += arguments


def change(session: Session, kind: str, before: Object, words: tuple[str, ...], *, dry_run: bool) -> Object:
    """The object as it is (or would be) with these ``KEY=VALUE`` changes."""
    return session.patch(kind, before["meta"]["id"], spec=assigned(before, words), dry_run=dry_run)


def assigned(before: Object, words: tuple[str, ...]) -> dict[str, Any]:
    """The patch of a spec. A list is replaced as a whole, so one that is reached into starts as it was."""
    spec: dict[str, Any] = {}
    for word in words:
        first = keys(word.partition("=")[0])[0]
        if isinstance(was := before["spec"].get(first), list):
            spec.setdefault(first, copy.deepcopy(was))
        assign(spec, word, "KEY=VALUE")
    return spec


def show(session: Session, after: Object, changed: list[Changed], *, dry_run: bool) -> None:
    name = clean(after["meta"]["name"])
    if session.output == "json":
        print_json({"item": after, "changes": [one._asdict() for one in changed], "dry_run": dry_run})
    elif session.output == "name":
        print(name)
    elif not changed:
        print(f"{name}: that is how it is already")
    else:
        rows = [[one.field, _text(one.before), _text(one.after), _when(one)] for one in changed]
        print(f"{name} {'would change' if dry_run else 'changed'}:")
        print(table(["FIELD", "FROM", "TO", "TAKES EFFECT"], rows))


def _when(one: Changed) -> str:
    return WHEN[one.effect] + (f": {clean(one.why)}" if one.why else "")


def _text(value: Any) -> str:
    return "none" if value is None else clean(str(value))
