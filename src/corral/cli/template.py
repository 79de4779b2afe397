"""``corral template …``: booted VMs, frozen, that launches fork from."""

from __future__ import annotations

from typing import Any

import click

from corral.cli import failures
from corral.cli.command import Command
from corral.cli.noun import noun
from corral.cli.obtain import ensure_image
from corral.cli.output import print_json, print_one
from corral.cli.parameters import DURATION, SIZE
from corral.cli.session import Session
from corral.cli.wait import Waiting
from corral.errors import CorralError
from corral.units import format_size

template = noun("template", deletable=True)


@template.command("create", cls=Command)
@click.argument("image")
@click.option("--name", "-n", help="Its name (default: after image and size).")
@click.option("--cpus", type=int, metavar="N", help="Virtual CPUs (default: 1).")
@click.option("--memory", "-m", type=SIZE, metavar="SIZE", help="Memory, like 512M (default).")
@click.option("--disk", type=SIZE, metavar="SIZE", help="Root disk, like 5G (default: the image's own size).")
@click.option("--no-network", is_flag=True, help="Without a network card.")
@click.option("--wait/--no-wait", default=True, help="Return when it is ready (default), or at once.")
@click.option("--timeout", type=DURATION, metavar="TIME", help="Longest time it may take (default: 10m).")
@click.pass_obj
def create(
    session: Session, /, image: str, name: str | None, no_network: bool, wait: bool, timeout: float | None, **size: Any
) -> int:
    """Boot a VM of IMAGE once and freeze it. Launches that ask for the same are up in a fraction of the time.

    \b
    corral template create debian --memory 1G
    """
    ensure_image(session, image)
    spec: dict[str, Any] = {"image": image} | {field: value for field, value in size.items() if value is not None}
    if no_network:
        spec["cards"] = 0
    accepted = session.create("template", name=name, spec=spec, timeout_s=timeout)
    made = accepted.items[0]
    if wait:
        for error in Waiting(session, accepted.tasks).run(None if timeout is None else timeout + 10):
            raise error
        made = session.get("template", made["meta"]["id"])
    status = made["status"]
    text = f"{failures.clean(made['meta']['name'])}: {status['phase']}"
    if status["phase"] == "ready":
        text += f" ({format_size(status['memory'])} of memory, {format_size(status['disk'])} on disk)"
    print_one(made, session.output, text)
    return 0


@template.command("prune", cls=Command)
@click.option("--all", "every", is_flag=True, help="Also those that were asked for.")
@click.pass_obj
def prune(session: Session, every: bool) -> int:
    """Delete the templates that nobody uses: those the platform made, failed and stale ones."""
    gone, kept = [], 0
    for one in session.list("template"):
        if not (every or one["spec"]["auto"] or one["status"]["phase"] in ("stale", "error")):
            continue
        try:
            session.delete("template", one["meta"]["id"])
            gone.append(one["meta"]["name"])
        except CorralError as error:
            if error.code not in ("in-use", "not-found"):
                raise
            kept += error.code == "in-use"
    if session.output == "json":
        print_json({"deleted": gone, "in_use": kept})
        return 0
    for name in gone:
        print(failures.clean(name) if session.output == "name" else f"{failures.clean(name)}: deleted")
    if kept and session.output != "name":
        failures.line(f"{kept} in use stay{'s' if kept == 1 else ''}")
    return 0
