"""``corral top``: who gets the CPU time and the memory, live on a terminal, once elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from corral.cli.command import Command
from corral.cli.failures import clean
from corral.cli.output import Object, print_json, table
from corral.cli.session import Session
from corral.errors import CorralError
from corral.units import format_size

EVERY_S = 1.0
"""The governor's own period."""


@click.command("top", cls=Command)
@click.option("--once", is_flag=True, help="Print it once and end (the default without a terminal).")
@click.pass_obj
def top(session: Session, once: bool) -> None:
    """Who uses what on this host: every running VM, the busiest first. CPU in cores; Ctrl-C ends it.

    \b
    ENTITLED  what it should have, by its weight and what it wants
    GRANTED   what it could have at least, if it wanted more
    WAIT      threads that were ready to run and did not
    CREDIT    CPU-seconds that it is owed
    HOLDS     what its QEMU has of the host's memory, emulation included
    """
    live = sys.stdout.isatty() and not once and session.output in ("table", "wide")
    if live:
        _live(session)
        return
    usage = session.client.usage()
    if session.output == "json":
        print_json(usage)
    elif session.output == "name":
        print("".join(f"{clean(vm['name'])}\n" for vm in _sorted(usage)), end="")
    else:
        print(picture(usage))


def _live(session: Session) -> None:
    from rich.live import Live
    from rich.text import Text

    # On the terminal's other screen: what was printed before is there again afterwards.
    with Live(Text(""), screen=True, auto_refresh=False) as screen:
        try:
            while True:
                try:
                    text = picture(session.client.usage())
                except CorralError as error:
                    if error.exit_status != 5:
                        raise
                    text = f"{error.message}; trying again"
                screen.update(Text.from_ansi(text, no_wrap=True, overflow="ellipsis"), refresh=True)
                time.sleep(EVERY_S)
        except KeyboardInterrupt:
            return


def picture(usage: Object) -> str:
    """All of it as text: the host, its projects when there are several, its VMs."""
    blocks = [_host(usage["host"])]
    if len(usage["projects"]) > 1:
        rows = [
            [clean(p["name"]), str(p["vms"]), str(p["weight"]), _cores(p["entitled"]), _cores(p["granted"]),
             _cores(p["used"]), _bytes(p["memory_size"]), _bytes(p["memory_used"])]
            for p in sorted(usage["projects"], key=lambda p: (-(p["used"] or 0.0), p["name"]))
        ]  # fmt: skip
        titles = ["PROJECT", "VMS", "WEIGHT", "ENTITLED", "GRANTED", "USED", "MEMORY", "HOLDS"]
        blocks.append(table(titles, rows))
    several = len(usage["projects"]) > 1
    titles = ["VM", "WEIGHT", "LIMIT", "ENTITLED", "GRANTED", "USED", "WAIT", "CREDIT", "MEMORY", "HOLDS", "PHASE"]
    rows = [_row(vm, several) for vm in _sorted(usage)]
    blocks.append(table(titles, rows) if rows else "no VM is running")
    return "\n\n".join(blocks)


def _sorted(usage: Object) -> list[Any]:
    return sorted(usage["vms"], key=lambda vm: (-(vm["cpu"]["used"] or 0.0), vm["project"], vm["name"]))


def _row(vm: Object, several: bool) -> list[str]:
    cpu, memory = vm["cpu"], vm["memory"]
    name = f"{vm['project']}/{vm['name']}" if several else vm["name"]
    credit = "-" if cpu["credit"] is None else f"{cpu['credit']:+.2f}"
    return [
        clean(name), str(cpu["weight"]), _cores(cpu["limit"]), _cores(cpu["entitled"]), _cores(cpu["granted"]),
        _cores(cpu["used"]), _cores(cpu["wait"]), credit, _bytes(memory["size"]), _bytes(memory["used"]),
        clean(vm["phase"]),
    ]  # fmt: skip


def _host(host: Object) -> str:
    free, size = format_size(host["memory_available"]), format_size(host["memory"])
    lines = [f"{clean(host['name'])}: {host['cores']} cores, {free} of {size} memory available"]
    if host["idle"] is not None:
        lines.append(
            f"cores idle {host['idle']:.2f}, other programs {host['foreign']:.2f}, governor {host['governor']:.3f}"
        )
        lines.append(f"shares by {clean(host['mode'])}" + (", steering" if host["steering"] else ""))
    return "\n".join(lines)


def _cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else format_size(value)
