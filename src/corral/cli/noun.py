"""``corral NOUN list|show|delete``, the same for every kind of the table of kinds."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import click

from corral.cli import failures
from corral.cli.command import Command, Lazy, LazyGroup
from corral.cli.describe import every_field
from corral.cli.output import print_json, print_list, print_one
from corral.cli.power import named
from corral.cli.session import Session
from corral.errors import CorralError
from corral.model.kinds import KINDS, Kind


def noun(name: str, *, deletable: bool, more: Mapping[str, Lazy] | None = None) -> LazyGroup:
    """The group of one kind: list, show, delete where users may, and verbs of its own (loaded when typed)."""
    kind = KINDS[name]
    group = LazyGroup(name, table=dict(more or {}), help=_capital(kind.summary) + ".", no_args_is_help=True)
    group.add_command(list_command(kind))
    group.add_command(show_command(kind))
    if deletable:
        group.add_command(delete_command(kind))
    return group


def read_only_noun(name: str) -> LazyGroup:
    """A kind that users only look at."""
    return noun(name, deletable=False)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def list_command(kind: Kind) -> click.Command:
    @click.pass_obj
    def run(session: Session, all_projects: bool = False, label: tuple[str, ...] = ()) -> None:
        print_list(kind, session.list(kind.name, all_projects=all_projects, labels=label), session.output)

    params: list[click.Parameter] = [
        click.Option(["--label", "-l"], multiple=True, metavar="K=V", help="Only those with this label.")
    ]
    if kind.scoped:
        params.append(click.Option(["--all-projects", "-A"], is_flag=True, help="Those of every project."))
    return Command("list", callback=run, params=params, help=f"List {kind.plural}.")


def show_command(kind: Kind) -> click.Command:
    @click.pass_obj
    def run(session: Session, name: str) -> None:
        item = session.get(kind.name, name)
        print_one(item, session.output, every_field(item))

    return Command("show", callback=run, params=[click.Argument(["name"])], help=f"Everything about one {kind.name}.")


def delete_command(kind: Kind) -> click.Command:
    @click.pass_obj
    def run(session: Session, names: tuple[str, ...]) -> int:
        return delete_each(session, kind, names)

    argument = click.Argument(["names"], nargs=-1, required=True, metavar="NAME...")
    return Command("delete", callback=run, params=[argument], help=f"Delete {kind.plural}.")


def delete_each(session: Session, kind: Kind, names: tuple[str, ...]) -> int:
    """Delete one by one, going on after an error; the exit status is the worst."""
    errors: list[CorralError] = []
    done: list[str] = []
    for name in dict.fromkeys(names):
        try:
            session.delete(kind.name, name)
            done.append(name)
        except CorralError as error:
            errors.append(named(error, name))
    if session.output == "json" and not errors:
        print_json({"deleted": done} if len(names) > 1 else {"deleted": done[0]})
    elif session.output != "json":
        for name in done:
            print(failures.clean(name) if session.output == "name" else f"{failures.clean(name)}: deleted")
    for problem in errors:
        failures.report(problem, as_json=session.output == "json" and problem is errors[0])
    sys.stdout.flush()
    return max((error.exit_status for error in errors), default=0)
