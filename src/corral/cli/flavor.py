"""``corral flavor …``: plans that VMs are made after."""

from __future__ import annotations

from typing import Any

import click

from corral.cli.command import Command
from corral.cli.noun import noun
from corral.cli.output import print_one
from corral.cli.parameters import SHARE, SIZE
from corral.cli.session import Session

flavor = noun("flavor", deletable=True)


@flavor.command("create", cls=Command)
@click.argument("name")
@click.option("--cpus", type=int, default=1, metavar="N", help="Virtual CPUs (default: 1).")
@click.option("--memory", "-m", type=SIZE, required=True, metavar="SIZE", help="Memory, like 1G.")
@click.option("--disk", type=SIZE, metavar="SIZE", help="Root disk, like 10G (default: the image's own size).")
@click.option("--weight", type=int, metavar="N", help="Share of CPU time against other VMs (default: 100).")
@click.option("--limit", type=SHARE, metavar="CORES", help="CPU time at most, like 0.5 or 50%.")
@click.option("--reserve", type=SHARE, metavar="CORES", help="CPU time that is always there.")
@click.option("--disk-iops", type=int, metavar="N", help="Reads and writes a second of the disk, at most.")
@click.option("--disk-bandwidth", type=SIZE, metavar="SIZE", help="Bytes a second of the disk at most, like 50M.")
@click.option("--disk-iops-burst", type=int, metavar="N", help="As much while credit lasts.")
@click.option("--disk-bandwidth-burst", type=SIZE, metavar="SIZE", help="As much while credit lasts.")
@click.option("--disk-burst-s", type=int, metavar="N", help="Credit: so many seconds' worth of a burst (default: 10).")
@click.option("--burst", type=float, metavar="SECONDS", help="CPU time that may be saved below the limit.")
@click.pass_obj
def create(session: Session, /, name: str, **options: Any) -> None:
    """Make a plan; `corral launch --flavor NAME` uses it."""
    spec: dict[str, Any] = {field: value for field, value in options.items() if value is not None}
    made = session.create("flavor", name=name, spec=spec).items[0]
    print_one(made, session.output, f"{name}: created")
