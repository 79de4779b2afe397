"""``corral event …``: what happened."""

from __future__ import annotations

import json
import time

import click

from corral.cli.command import Command
from corral.cli.noun import noun
from corral.cli.output import Object, cell
from corral.cli.session import Session
from corral.errors import Unavailable
from corral.model.kinds import KINDS

event = noun("event", deletable=False)


@event.command("watch", cls=Command)
@click.pass_obj
def watch(session: Session) -> None:
    """Print events as they happen, until Ctrl-C; with -o json one object a line."""
    away_since: float | None = None
    while True:
        try:
            for batch in session.client.watch("event", project=session.project):
                away_since = None
                for change in batch.changes:
                    if change.get("object"):
                        _print(change["object"], session.output)
        except Unavailable:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > 30.0:
                raise
            time.sleep(0.5)


def _print(item: Object, output: str) -> None:
    if output == "json":
        print(json.dumps(item, ensure_ascii=False), flush=True)
    elif output == "name":
        print(item["meta"]["id"], flush=True)
    else:
        print("  ".join(cell(item, column) for column in KINDS["event"].columns), flush=True)
