"""``start``, ``stop``, ``restart``, ``delete`` and the ``vm`` verbs like them: one thing done to several VMs.

Each VM is asked for by itself; one that refuses does not keep the others from it. The exit status is the worst.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from corral.cli import failures
from corral.cli.command import Command
from corral.cli.describe import scoped_name
from corral.cli.output import Object, name_of, print_json
from corral.cli.parameters import DURATION
from corral.cli.session import Session
from corral.cli.wait import Waiting
from corral.errors import CorralError

PATIENCE_S = 20.0
"""How long guests may take to power off when everything is to stop."""
_SENSIBLE: dict[str, Callable[[Object], bool]] = {
    "start": lambda vm: vm["spec"]["power"] != "running" or vm["status"]["phase"] in ("stopped", "error"),
    "stop": lambda vm: vm["spec"]["power"] != "stopped" or vm["status"]["phase"] != "stopped",
    "restart": lambda vm: vm["spec"]["power"] == "running",
}
"""For ``--all``: VMs to which the verb means something."""


def power_command(verb: str, about: str, *, forceable: bool, everything: bool = True) -> click.Command:
    """The command for one verb."""

    @click.pass_obj
    def run(session: Session, /, names: tuple[str, ...], **options: Any) -> int:
        targets = _targets(session, verb, names, all_=options.get("all_", False), yes=options.get("yes", False))
        return act(
            session, verb, targets,
            force=options.get("force", False), wait=options["wait"], timeout_s=options["timeout"],
        )  # fmt: skip

    params: list[click.Parameter] = [click.Argument(["names"], nargs=-1, metavar="NAME...")]
    if forceable:
        text = {"stop": "Cut the power instead of asking.", "restart": "Cut the power instead of asking."}
        params.append(click.Option(["--force", "-f"], is_flag=True, help=text.get(verb, "Even when it runs.")))
    if everything:
        params += [
            click.Option(["--all", "all_"], is_flag=True, help="Every VM of the project."),
            click.Option(["--yes", "-y"], is_flag=True, help="Do not ask."),
        ]
    params += [
        click.Option(["--wait/--no-wait"], default=True, help="Return when it is done (default), or at once."),
        click.Option(["--timeout"], type=DURATION, help="Longest time it may take, like 90s.", metavar="TIME"),
    ]
    return Command(verb, params=params, callback=run, help=about)


def _targets(session: Session, verb: str, names: tuple[str, ...], *, all_: bool, yes: bool) -> list[str]:
    if names and all_:
        raise click.UsageError("give names or --all, not both")
    if not names and not all_:
        raise click.UsageError(f"which VM? corral {verb} NAME... (or --all)")
    if not all_:
        return list(dict.fromkeys(names))
    if not yes and not sys.stdin.isatty():
        raise click.UsageError(f"{verb} --all asks first, and there is no terminal to ask on; --yes says it is meant")
    sensible = _SENSIBLE.get(verb)
    found = [vm for vm in session.list("vm") if sensible is None or sensible(vm)]
    if not found:
        failures.line(f"nothing to {verb}")
    elif not yes:
        print(f"{verb} {len(found)} VMs: {', '.join(map(scoped_name, found))}?", file=sys.stderr)
        if not click.confirm("Go on?", err=True):
            raise click.Abort
    return [vm["meta"]["id"] for vm in found]


def act(
    session: Session, verb: str, targets: Sequence[str], *, force: bool, wait: bool, timeout_s: float | None
) -> int:
    """Ask for ``verb`` on each target, wait for all, print what became of each; the exit status."""
    tasks: list[Object] = []
    errors: list[CorralError] = []
    for target in targets:
        try:
            tasks.append(session.act(verb, target, force=force, timeout_s=timeout_s))
        except CorralError as error:
            errors.append(named(error, target))
    if wait and tasks:
        waiting = Waiting(session, tasks)
        errors += waiting.run(timeout_s + 10 if timeout_s is not None else None)
        tasks = list(waiting.tasks.values())
    _answer(session, verb, tasks, single=len(targets) == 1, failed=bool(errors))
    for problem in errors:
        failures.report(problem, as_json=session.output == "json" and not tasks)
    return max((error.exit_status for error in errors), default=0)


def named(error: CorralError, target: str) -> CorralError:
    """The same error, with the name of the one it is about in front unless it is there already."""
    if target not in error.message:
        error.message = f"{target}: {error.message}"
    return error


def _answer(session: Session, verb: str, tasks: list[Object], *, single: bool, failed: bool) -> None:
    if session.output == "json":
        if tasks and not (single and failed):
            print_json(tasks[0] if single else tasks)
    elif session.output == "name":
        for task in tasks:
            if task["status"]["state"] == "done":
                print(failures.clean(task["spec"].get("target_name") or name_of(task)))
    else:
        for task in tasks:
            name = failures.clean(task["spec"].get("target_name") or task["spec"]["target_id"])
            if task["status"]["state"] == "done":
                print(f"{name}: {_DONE.get(verb, 'done')}")
            elif task["status"]["state"] in ("pending", "running"):
                print(f"{name}: {verb} is under way (task {task['meta']['id']})")


def stop_all(session: Session, *, force: bool) -> int:
    """Stop the VMs of every project, for ``corral down --all``: ask, and cut the power of those that do not listen."""
    running = [vm for vm in session.list("vm", all_projects=True) if _SENSIBLE["stop"](vm)]
    tasks = [session.act("stop", vm["meta"]["id"], force=force, timeout_s=PATIENCE_S) for vm in running]
    if Waiting(session, tasks).run(PATIENCE_S + 10):
        left = [vm for vm in session.list("vm", all_projects=True) if vm["status"]["phase"] != "stopped"]
        failures.line(f"cutting the power of {', '.join(map(scoped_name, left))}")
        tasks = [session.act("stop", vm["meta"]["id"], force=True, timeout_s=PATIENCE_S) for vm in left]
        errors = Waiting(session, tasks).run(PATIENCE_S + 10)
        return max((failures.report(error, as_json=False) for error in errors), default=0)
    return 0


_DONE = {
    "start": "running", "stop": "stopped", "restart": "running again", "reset": "reset", "pause": "paused",
    "resume": "running", "delete": "deleted",
}  # fmt: skip

start = power_command("start", "Start VMs; returns when their guests answer.", forceable=False)
stop = power_command("stop", "Ask guests to power off. With --force the power is cut.", forceable=True)
restart = power_command("restart", "Stop VMs and start them again.", forceable=True)
delete = power_command("delete", "Delete VMs with their disks. A running one only with --force.", forceable=True)
reset = power_command("reset", "Press the reset button: the guest is not asked.", forceable=False, everything=False)
pause = power_command("pause", "Stop the CPUs; memory stays as it is.", forceable=False, everything=False)
resume = power_command("resume", "Let a paused VM go on.", forceable=False, everything=False)
