"""``corral top``: who gets the CPU time, the memory and the disks, live on a terminal, once elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import click

from corral.cli.command import Command
from corral.cli.failures import clean
from corral.cli.output import Object, print_json, table
from corral.cli.session import Session
from corral.errors import CorralError
from corral.units import format_size

EVERY_S = 1.0
"""The governor's own period."""
WIDTH = 120
"""Columns that a table takes at most, names being cut for it; ``-o wide`` takes what it needs."""
LEAST_NAME = 12


@click.command("top", cls=Command)
@click.option("--once", is_flag=True, help="Print it once and end (the default without a terminal).")
@click.option("--sort", type=click.Choice(("cpu", "memory", "disk", "name")), default="cpu", help="What comes first.")
@click.option("--projects", is_flag=True, help="Projects, each with all its VMs together.")
@click.pass_obj
def top(session: Session, once: bool, sort: str, projects: bool) -> None:
    """Who uses what on this host: every running VM, the busiest first. CPU in cores; Ctrl-C ends it.

    \b
    ENTITLED     what it should have, by its weight and what it wants
    GRANTED      what it could have at least, if it wanted more
    WAIT         threads that were ready to run and did not
    CREDIT       CPU-seconds that it is owed
    HOLDS        what its QEMU has of the host's memory, emulation included
    MEMORY       what the guest has; GRANTED/SIZE while it has less than its size
    READ, WRITE  bytes a second of all its drives; IOPS: reads and writes a second

    -o wide adds limits, reservations, time held by limits, savings for bursts, and network cards.

    \b
    corral top --sort disk
    corral top --projects --once
    corral top -o json
    """
    view = View(sort, projects, wide=session.output == "wide")
    live = sys.stdout.isatty() and not once and session.output in ("table", "wide")
    if live:
        _live(session, view)
        return
    usage = session.client.usage() if session.output == "name" else _with_rates(session)
    if session.output == "json":
        print_json(usage)
    elif session.output == "name":
        rows = view.sorted_projects(usage) if projects else view.sorted_vms(usage)
        print("".join(f"{clean(row['name'])}\n" for row in rows), end="")
    else:
        print(view.picture(usage))


def _with_rates(session: Session) -> Object:
    """Rates are the difference of two looks: who looks once looks twice, unless somebody else has just looked."""
    usage = session.client.usage()
    if any(disk["read_rate"] is None for vm in usage["vms"] for disk in vm["disks"]):
        time.sleep(EVERY_S)
        usage = session.client.usage()
    return usage


def _live(session: Session, view: View) -> None:
    from rich.live import Live
    from rich.text import Text

    # On the terminal's other screen: what was printed before is there again afterwards.
    with Live(Text(""), screen=True, auto_refresh=False) as screen:
        try:
            while True:
                try:
                    text = view.picture(session.client.usage())
                except CorralError as error:
                    if error.exit_status != 5:
                        raise
                    text = f"{error.message}; trying again"
                screen.update(Text.from_ansi(text, no_wrap=True, overflow="ellipsis"), refresh=True)
                time.sleep(EVERY_S)
        except KeyboardInterrupt:
            return


class Column(NamedTuple):
    """``read``: the cell of a row."""

    title: str
    read: Callable[[Object], str]
    wide: bool = False


class View(NamedTuple):
    """How it is shown."""

    sort: str = "cpu"
    projects: bool = False
    wide: bool = False

    def picture(self, usage: Object) -> str:
        """All of it as text: the host, its projects when there are several, its VMs."""
        blocks = [_host(usage["host"])]
        several = len(usage["projects"]) > 1
        if self.projects or several:
            rows = self.sorted_projects(usage)
            blocks.append(self._table("PROJECT", [(clean(row["name"]), row) for row in rows], PROJECT_COLUMNS))
        if not self.projects:
            named = [(clean(f"{vm['project']}/{vm['name']}" if several else vm["name"]), vm)
                     for vm in self.sorted_vms(usage)]  # fmt: skip
            blocks.append(self._table("VM", named, VM_COLUMNS))
        return "\n\n".join(blocks)

    def sorted_vms(self, usage: Object) -> list[Any]:
        """The largest first; those that are equal by name."""
        weigh = _WEIGH_VM[self.sort]
        return sorted(usage["vms"], key=lambda vm: (-(weigh(vm) or 0), vm["project"], vm["name"]))

    def sorted_projects(self, usage: Object) -> list[Any]:
        """Like :meth:`sorted_vms`."""
        weigh = _WEIGH_PROJECT[self.sort]
        return sorted(usage["projects"], key=lambda p: (-(weigh(p) or 0), p["name"]))

    def _table(self, title: str, rows: list[tuple[str, Object]], columns: Iterable[Column]) -> str:
        if not rows:
            return "no VM is running"
        shown = [column for column in columns if self.wide or not column.wide]
        titles = [column.title for column in shown]
        cells = [[column.read(row) for column in shown] for _, row in rows]
        taken = sum(2 + max(len(line[n]) for line in (titles, *cells)) for n in range(len(shown)))
        room = max(map(len, (title, *(name for name, _ in rows)))) if self.wide else max(LEAST_NAME, WIDTH - taken)
        return table([title, *titles], [[_cut(name, room), *line] for (name, _), line in zip(rows, cells, strict=True)])


def _cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else format_size(round(value))


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _memory(memory: Object) -> str:
    """What the guest has; while it has less than its size, of how much: ``384M/512M``."""
    granted, size = memory.get("granted"), memory["size"]
    return _bytes(size) if granted in (None, size) else f"{_bytes(granted)}/{_bytes(size)}"


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _sum(values: Iterable[float | None]) -> float | None:
    """None when nothing is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _rates(vm: Object, *fields: str) -> list[float | None]:
    return [disk[field] for disk in vm["disks"] for field in fields]


_WEIGH_VM: dict[str, Callable[[Object], float | None]] = {
    "cpu": lambda vm: vm["cpu"]["used"],
    "memory": lambda vm: vm["memory"]["used"],
    "disk": lambda vm: _sum(_rates(vm, "read_rate", "write_rate")),
    "name": lambda vm: None,
}
_WEIGH_PROJECT: dict[str, Callable[[Object], float | None]] = {
    "cpu": lambda p: p["used"],
    "memory": lambda p: p["memory_used"],
    "disk": lambda p: _sum((p["disk_read"], p["disk_write"])),
    "name": lambda p: None,
}

C = Column
VM_COLUMNS: tuple[Column, ...] = (
    C("WEIGHT", lambda vm: str(vm["cpu"]["weight"])),
    C("LIMIT", lambda vm: _cores(vm["cpu"]["limit"]), True),
    C("RESERVE", lambda vm: _cores(vm["cpu"]["reserve"]), True),
    C("ENTITLED", lambda vm: _cores(vm["cpu"]["entitled"])),
    C("GRANTED", lambda vm: _cores(vm["cpu"]["granted"])),
    C("USED", lambda vm: _cores(vm["cpu"]["used"])),
    C("WAIT", lambda vm: _cores(vm["cpu"]["wait"])),
    C("HELD", lambda vm: _cores(vm["cpu"]["throttled"]), True),
    C("CREDIT", lambda vm: _signed(vm["cpu"]["credit"])),
    C("SAVED", lambda vm: _cores(vm["cpu"]["saved"]), True),
    C("MEMORY", lambda vm: _memory(vm["memory"])),
    C("HOLDS", lambda vm: _bytes(vm["memory"]["used"])),
    C("READ", lambda vm: _bytes(_sum(_rates(vm, "read_rate")))),
    C("WRITE", lambda vm: _bytes(_sum(_rates(vm, "write_rate")))),
    C("IOPS", lambda vm: _count(_sum(_rates(vm, "iops")))),
    C("RECEIVE", lambda vm: _bytes(_sum(nic["receive_rate"] for nic in vm["nics"])), True),
    C("SEND", lambda vm: _bytes(_sum(nic["send_rate"] for nic in vm["nics"])), True),
    C("ACCEL", lambda vm: clean(vm["accelerator"]) or "-", True),
    C("PHASE", lambda vm: clean(vm["phase"])),
)
PROJECT_COLUMNS: tuple[Column, ...] = (
    C("VMS", lambda p: str(p["vms"])),
    C("WEIGHT", lambda p: str(p["weight"])),
    C("LIMIT", lambda p: _cores(p["limit"]), True),
    C("RESERVE", lambda p: _cores(p["reserve"]), True),
    C("ENTITLED", lambda p: _cores(p["entitled"])),
    C("GRANTED", lambda p: _cores(p["granted"])),
    C("USED", lambda p: _cores(p["used"])),
    C("MEMORY", lambda p: _bytes(p["memory_size"])),
    C("HOLDS", lambda p: _bytes(p["memory_used"])),
    C("READ", lambda p: _bytes(p["disk_read"])),
    C("WRITE", lambda p: _bytes(p["disk_write"])),
    C("IOPS", lambda p: _count(p["disk_iops"])),
    C("RECEIVE", lambda p: _bytes(p["receive"]), True),
    C("SEND", lambda p: _bytes(p["send"]), True),
)


def _host(host: Object) -> str:
    free, size = format_size(host["memory_available"]), format_size(host["memory"])
    lines = [f"{clean(host['name'])}: {host['cores']} cores, {free} of {size} memory available"]
    if host["idle"] is not None:
        lines.append(
            f"cores idle {host['idle']:.2f}, other programs {host['foreign']:.2f}, governor {host['governor']:.3f}"
        )
        lines.append(f"shares by {clean(host['mode'])}" + (", steering" if host["steering"] else ""))
    return "\n".join(lines)
