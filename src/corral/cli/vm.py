"""``corral vm …``: what the daily verbs leave out."""

from __future__ import annotations

import time
from typing import Any

import click

from corral.cli import failures, power
from corral.cli.command import Command, Lazy
from corral.cli.launch import failed, request, show_vms, vm_options
from corral.cli.noun import noun
from corral.cli.obtain import ensure_image
from corral.cli.output import print_json, print_list
from corral.cli.parameters import DURATION, pairs
from corral.cli.session import Session
from corral.cli.set import set_vm
from corral.cli.wait import Waiting
from corral.errors import CorralError, Refused, TimedOut
from corral.model.kinds import KINDS
from corral.model.vm import Phase

vm = noun(
    "vm",
    deletable=False,
    more={
        "list": Lazy("corral.cli.daily", "list_vms", "List VMs."),
        "explain": Lazy("corral.cli.why", "explain", "Why a VM is slow, or does not run."),
    },
)
del vm.commands["list"]  # the daily one has more filters
for _name in ("start", "stop", "restart", "delete", "reset", "pause", "resume"):
    vm.add_command(getattr(power, _name))
vm.add_command(set_vm)


@vm.command("show", cls=Command)
@click.argument("name")
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Everything about one VM, and what it has of each resource now, as `corral info`."""
    from corral.cli.daily import show_vm

    show_vm(session, session.get("vm", name))


@vm.command("create", cls=Command)
@click.argument("image")
@click.option("--start/--no-start", default=False, help="Start it at once (default: leave it stopped).")
@click.pass_obj
def create(session: Session, /, image: str, start: bool, dry_run: bool, **options: Any) -> int:
    """Make a VM without starting it; prints its name."""
    body = request(image, options)
    body["spec"].setdefault("power", "running" if start else "stopped")
    ensure_image(session, image, quiet=dry_run)
    accepted = session.create("vm", dry_run=dry_run, **body)
    errors = [] if dry_run else Waiting(session, accepted.tasks).run()
    for error in errors:
        failures.report(error, as_json=False)
    single = options["count"] is None
    if session.output == "json":
        print_json(accepted.items[0] if single else accepted.items)
    elif session.output == "wide":
        print_list(KINDS["vm"], accepted.items, "wide")
    else:
        print("\n".join(failures.clean(item["meta"]["name"]) for item in accepted.items))
    return max((error.exit_status for error in errors), default=0)


create.params += vm_options


@vm.command("fork", cls=Command)
@click.argument("name", metavar="VM")
@click.option("--name", "-n", "called", help="Its name (default: VM's and some digits). With --count: NAME-1, …")
@click.option("--count", type=click.IntRange(1), metavar="K", help="Make several at once, of the same instant.")
@click.option("--label", "-l", multiple=True, metavar="K=V", help="A label; may be repeated.")
@click.option("--wait/--no-wait", default=True, help="Return when the guests answer (default), or at once.")
@click.option("--timeout", type=DURATION, metavar="TIME", help="Longest time until they answer (default: 120s).")
@click.pass_obj
def fork(
    session: Session, name: str, called: str | None, count: int | None, label: tuple[str, ...], wait: bool,
    timeout: float | None,
) -> int:  # fmt: skip
    """Fork a running VM: others with its memory and disk as they are now, and identities of their own.

    \b
    corral vm fork web --name trial
    corral vm fork web --count 3
    """
    accepted = session.fork(name, name=called, count=count, labels=pairs(label, "--label"), timeout_s=timeout)
    errors = Waiting(session, accepted.tasks).run(None if timeout is None else timeout + 10) if wait else []
    vms = [session.get("vm", item["meta"]["id"]) for item in accepted.items]
    if errors:
        return failed(session, vms, errors)
    show_vms(session, vms, single=count is None, note="" if wait else "is being forked")
    pause = ((vms[0]["status"].get("details") or {}).get("start") or {}).get("pause_s")
    if session.output == "table" and pause is not None:
        print(f"{failures.clean(name)} stood still for {1000 * pause:.0f} ms")
    return 0


@vm.command("wait", cls=Command)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--for", "phase", type=click.Choice([p.value for p in Phase] + ["deleted"]), default="running")
@click.option("--timeout", type=DURATION, default=120.0, metavar="TIME", help="Longest time to wait (default: 120s).")
@click.pass_obj
def wait(session: Session, names: tuple[str, ...], phase: str, timeout: float) -> int:
    """Wait until each VM is in a phase (default: running, which means that the guest answers)."""
    until = time.monotonic() + timeout
    statuses = []
    for name in names:
        try:
            seen = wait_for(session, name, phase, until)
            if session.output in ("table", "wide"):
                print(f"{failures.clean(name)}: {seen}")
            statuses.append(0)
        except CorralError as error:
            statuses.append(failures.report(power.named(error, name), as_json=session.output == "json"))
    return max(statuses)


def wait_for(session: Session, name: str, phase: str, until: float) -> str:
    """Return when the VM is in ``phase`` (or gone: ``deleted``). Raises TimedOut, or Refused when it never will be."""
    while True:
        try:
            found = session.get("vm", name)
        except CorralError as error:
            if error.code == "not-found" and phase == "deleted":
                return "deleted"
            if error.exit_status != 5 or time.monotonic() >= until:
                raise
        else:
            now, reason = found["status"]["phase"], found["status"].get("reason") or ""
            if now == phase:
                return phase
            if now == "error" and phase == "running" and found["status"].get("retry_at") is None:
                raise Refused(f"it is in error: {reason or 'no reason is known'}", code="wrong-phase")
            if time.monotonic() >= until:
                why = f" ({reason})" if reason else ""
                raise TimedOut(
                    f"it is {now}{why}, not {phase}", hint=f"corral logs {name} shows what the guest printed"
                )
        time.sleep(0.2)
