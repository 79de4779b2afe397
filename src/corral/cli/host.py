"""``corral host …``: the machines that run VMs."""

from __future__ import annotations

import click

from corral.cli.command import Command
from corral.cli.failures import clean
from corral.cli.noun import noun
from corral.cli.output import print_one
from corral.cli.session import Session
from corral.cli.set import set_host

host = noun("host", deletable=False)
host.add_command(set_host)


@host.command("probe", cls=Command)
@click.argument("name", default="")
@click.pass_obj
def probe(session: Session, name: str) -> None:
    """Find out again which accelerators really run a guest (default: this machine)."""
    if not name:
        hosts = session.list("host")
        if len(hosts) != 1:
            raise click.UsageError("which host? `corral host list` shows them")
        name = hosts[0]["meta"]["id"]
    item = session.probe(name)
    used = item["status"]["accelerator"]
    lines = [f"{clean(item['meta']['name'])}: VMs get {clean(used) or 'no accelerator'}"]
    for found in item["status"]["accelerators"]:
        lines.append(f"  {found['name']}: {'works' if found['works'] else 'does not work'}: {clean(found['reason'])}")
    print_one(item, session.output, "\n".join(lines))
