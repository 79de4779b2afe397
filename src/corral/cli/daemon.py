"""``up``, ``down``, ``version``: the daemon of this machine."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

import corral
from corral.cli import failures
from corral.cli.command import Command
from corral.cli.output import print_json
from corral.cli.session import Session
from corral.client import local
from corral.errors import CorralError, TimedOut, Unavailable

STOP_S = 30.0
"""How long a daemon may take to end: it finishes the step that it is at."""


@click.command("up", cls=Command)
@click.option("--foreground", is_flag=True, help="Stay in front, for a service manager; logs go to stderr.")
@click.option("--listen", metavar="HOST:PORT", help="Listen on TCP too.")
@click.pass_obj
def up(session: Session, foreground: bool, listen: str | None) -> None:
    """Start the platform on this machine and print where it listens."""
    extra = ("--listen", listen) if listen else ()
    if foreground:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "corral.server", "--state", str(session.state), *extra])
    started = local.listening(session.state) is False and local.start(session.state, extra)
    with session.connect(local=True) as client:
        version = client.version()
    if listen and not started and listen not in (version.get("listen") or []):
        raise CorralError(
            f"the daemon runs already (pid {version['pid']}) and does not listen on {listen}", code="conflict",
            hint="`corral down` first: VMs go on running",
        )  # fmt: skip
    if session.output == "json":
        print_json(version)
        return
    print(f"listening on unix:{session.state / local.SOCKET}" + (f" and {listen}" if listen else ""))
    if not started:
        failures.line(f"it was running already (pid {version['pid']})")


@click.command("down", cls=Command)
@click.option("--all", "all_", is_flag=True, help="Stop the VMs too.")
@click.option("--force", is_flag=True, help="With --all: cut their power.")
@click.option("--yes", "-y", is_flag=True, hidden=True, help="Accepted for symmetry; nothing is asked.")
@click.pass_obj
def down(session: Session, all_: bool, force: bool, yes: bool) -> int:
    """Stop the daemon. VMs go on running, and are found again by the next one."""
    if not local.listening(session.state):
        if not (all_ and (session.state / "store.db").exists()):
            failures.line(f"no daemon runs on {session.state}")
            return 0
        local.start(session.state)  # VMs that run without a daemon are stopped by one
    session.url = ""  # this machine's daemon is meant
    status = _stop_vms(session, force=force) if all_ else 0
    with session.connect() as client:
        pid = int(client.version()["pid"])
    _end(pid)
    if session.output == "table":
        print("stopped" if status == 0 else "stopped, but not every VM")
    return status


def _stop_vms(session: Session, *, force: bool) -> int:
    from corral.cli.power import stop_all

    return stop_all(session, force=force)


def _end(pid: int) -> None:
    """Ask the daemon to end, and see that it has. Raises TimedOut: nothing is killed that we do not understand."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        import select

        ended, _, _ = select.select([handle], [], [], STOP_S)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise CorralError(f"the daemon (pid {pid}) belongs to another user", code="denied") from error
    finally:
        os.close(handle)
    if not ended:
        raise TimedOut(f"the daemon (pid {pid}) has not ended after {STOP_S:g} s", hint=f"kill -KILL {pid} ends it")


@click.command("version", cls=Command)
@click.pass_obj
def version(session: Session) -> None:
    """Versions of this command and of the daemon, if one runs (it is not started for this)."""
    body: dict[str, Any] = {"client": corral.__version__}
    try:
        if session.url or local.listening(session.state):
            with session.connect() as client:
                body |= client.version()
    except Unavailable as error:
        failures.line(f"hint: no daemon answers: {error.message}")
    if session.output == "json":
        print_json(body)
        return
    print(f"corral {corral.__version__}")
    if "pid" in body:
        print(f"daemon {body.get('version', '?')}, pid {body['pid']}")
