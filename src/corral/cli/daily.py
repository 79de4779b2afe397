"""``list``, ``info``, ``logs``: looking at VMs."""

from __future__ import annotations

import sys

import click

from corral.cli.command import Command
from corral.cli.output import Object, print_list, print_one
from corral.cli.session import Session
from corral.model.kinds import KINDS


@click.command("list", cls=Command)
@click.option("--all-projects", "-A", is_flag=True, help="VMs of every project.")
@click.option("--label", "-l", metavar="K=V", multiple=True, help="Only VMs with this label; may be repeated.")
@click.option("--phase", metavar="PHASE", help="Only VMs in this phase, like running.")
@click.pass_obj
def list_vms(session: Session, all_projects: bool, label: tuple[str, ...], phase: str | None) -> None:
    """List VMs, by name."""
    items = session.list("vm", all_projects=all_projects, labels=label, phase=phase)
    print_list(KINDS["vm"], items, session.output)
    if not items and session.output == "table" and sys.stderr.isatty() and not (label or phase):
        print("hint: a first VM: corral launch debian --name web", file=sys.stderr)


@click.command("info", cls=Command)
@click.argument("name")
@click.pass_obj
def info(session: Session, name: str) -> None:
    """Everything about one VM, and what it has of each resource now; `-o wide` shows every field of its record.

    \b
    corral info web
    corral info web -o json
    """
    show_vm(session, session.get("vm", name))


def show_vm(session: Session, vm: Object) -> None:
    from corral.cli.describe import every_field, vm_summary

    if session.output != "table":
        print_one(vm, session.output, every_field(vm))
        return
    measured = None
    if vm["status"].get("pid") is not None:
        rows = session.client.usage()["vms"]
        measured = next((row for row in rows if row["id"] == vm["meta"]["id"]), None)
    print(vm_summary(vm, measured))


@click.command("logs", cls=Command)
@click.argument("name")
@click.option("--follow", "-f", is_flag=True, help="Go on with whatever comes, until Ctrl-C.")
@click.option("--tail", "tail", type=click.IntRange(0), default=1 << 20, help="Only the last BYTES.", metavar="BYTES")
@click.pass_obj
def logs(session: Session, name: str, follow: bool, tail: int) -> None:
    """What the VM's serial console printed, as the guest printed it."""
    out = sys.stdout.buffer
    if not follow:
        out.write(session.log(name, tail))
        return
    for piece in session.follow_log(name, tail):
        out.write(piece)
        out.flush()
