"""``corral task …``: what is being done, and what was."""

from __future__ import annotations

import click

from corral.cli import failures
from corral.cli.command import Command
from corral.cli.noun import noun
from corral.cli.output import print_one
from corral.cli.parameters import DURATION
from corral.cli.power import named
from corral.cli.session import Session
from corral.cli.wait import Waiting
from corral.errors import CorralError

task = noun("task", deletable=False)


@task.command("cancel", cls=Command)
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.pass_obj
def cancel(session: Session, ids: tuple[str, ...]) -> int:
    """Give up what is under way: a launch ends stopped, a stop goes on running."""
    statuses = []
    for number in ids:
        try:
            found = session.cancel(number)
            print_one(found, session.output, f"{number}: {found['status']['state']}")
            statuses.append(0)
        except CorralError as error:
            statuses.append(failures.report(named(error, number), as_json=session.output == "json"))
    return max(statuses)


@task.command("wait", cls=Command)
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("--timeout", type=DURATION, metavar="TIME", help="Longest time to wait.")
@click.pass_obj
def wait(session: Session, ids: tuple[str, ...], timeout: float | None) -> int:
    """Wait until tasks have ended; fails if one of them did."""
    waiting = Waiting(session, [session.get("task", number) for number in ids])
    errors = waiting.run(timeout)
    for found in waiting.tasks.values():
        words = f"{found['spec']['verb']} {failures.clean(found['spec']['target_name'])}: {found['status']['state']}"
        print_one(found, session.output, words)
    for error in errors:
        failures.report(error, as_json=False)
    return max((error.exit_status for error in errors), default=0)
