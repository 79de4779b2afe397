"""``corral cp``: files into and out of a VM, as a tar stream through a program in the guest."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click

from corral.cli import failures
from corral.cli.command import Command
from corral.cli.progress import Transfer
from corral.cli.session import Session
from corral.errors import Invalid, Problem


class Place(NamedTuple):
    """One side of a copy: a path in a VM, or (``vm`` empty) of this machine."""

    vm: str
    path: str


def parse_place(text: str) -> Place:
    """``NAME:/path`` and ``PROJECT/NAME:/path`` are in a VM; ``./a:b`` and ``/a:b`` are not. Raises Invalid."""
    before, colon, after = text.partition(":")
    if not colon or not before or before.startswith((".", "/")):
        return Place("", text)
    if before.count("/") and not (before.count("/") == 1 and after.startswith("/")):
        return Place("", text)
    if not after.startswith("/"):
        raise Invalid([Problem(text, "a path in a VM begins with /", f"{before}:/{after}")], code="usage")
    return Place(before, after)


@click.command("cp", cls=Command)
@click.argument("source")
@click.argument("target")
@click.option("-r", "--recursive", is_flag=True, help="Copy directories with all that is in them.")
@click.pass_obj
def copy(session: Session, source: str, target: str, recursive: bool) -> int:
    """Copy a file, or with -r a directory, into a VM or out of it. One side is NAME:/path.

    A directory as the target means: into it. Modes are kept; owners are not (root in the guest, you here).

    \b
    corral cp notes.txt web:/root/
    corral cp -r web:/var/log ./logs
    """
    from corral.client.sync.files import fetch, send

    given, wanted = parse_place(source), parse_place(target)
    if bool(given.vm) == bool(wanted.vm):
        raise click.UsageError("one side is a path in a VM, NAME:/path, and the other is a path here")
    complaints: list[str] = []

    def complain(name: str, why: str) -> None:
        complaints.append(name)
        failures.line(f"error: {name} was not copied: {why}")

    with Transfer(f"{source} → {target}") as progress:
        if wanted.vm:
            send(
                session.client, Path(given.path), wanted.vm, wanted.path,
                recursive=recursive, complain=complain, progress=progress.add,
            )  # fmt: skip
        else:
            fetch(
                session.client, given.vm, given.path, Path(wanted.path), into=wanted.path.endswith("/"),
                recursive=recursive, complain=complain, progress=progress.add,
            )  # fmt: skip
    return 1 if complaints else 0
