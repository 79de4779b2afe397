"""``corral ssh``: the system's own ssh, told where the guest is, which key to use and which host key to expect."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time

import click

from corral.cli import failures
from corral.cli.command import GuestCommand
from corral.cli.exec import FAILED
from corral.cli.output import Object
from corral.cli.session import Session
from corral.errors import CorralError, NotFound, Refused, Unavailable

BANNER_S = 30.0
"""How long sshd may take to say who it is: it starts a little after the guest agent does."""


@click.command("ssh", cls=GuestCommand)
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--user", "-u", metavar="USER", help="As whom (default: the image's own user).")
@click.pass_obj
def ssh(session: Session, name: str, command: tuple[str, ...], user: str | None) -> int:
    """Log in to a VM by ssh, or run COMMAND there. The exit status is ssh's (255 if it could not connect)."""
    try:
        arguments = command_line(session, session.get("vm", name), user, command)
    except CorralError as error:
        failures.report(error, as_json=session.output == "json")
        return FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(arguments[0], arguments)
    raise AssertionError("execv does not return")


def command_line(session: Session, vm: Object, user: str | None, command: tuple[str, ...]) -> list[str]:
    """The ssh command for a VM whose sshd answers. Raises Refused, Unavailable."""
    name, number = vm["meta"]["name"], vm["meta"]["id"]
    program = shutil.which("ssh")
    if program is None:
        raise CorralError("ssh is not installed here", code="unsupported", hint="apt install openssh-client")
    if session.url and not session.url.startswith("unix:"):
        raise Refused("ssh needs the daemon's own key, so it works on the daemon's machine only", code="unsupported",
                      hint=f"corral exec -it {name} -- sh")  # fmt: skip
    address, port = _forward(vm)
    _await_banner(address, port, name)
    keys = session.client.http.address.socket
    assert keys is not None, "without a URL the daemon is at a socket"
    directory = keys.parent / "keys"
    arguments = [
        program, "-p", str(port), "-i", str(directory / "id_ed25519"),
        *_options(
            UserKnownHostsFile=f'"{directory / f"known_hosts-{number}"}"', HostKeyAlias=number,
            StrictHostKeyChecking="accept-new", IdentitiesOnly="yes", LogLevel="ERROR",
            GlobalKnownHostsFile="/dev/null",
        ),
        f"{user or _default_user(session, vm)}@{address}",
    ]  # fmt: skip
    return [*arguments, "--", *command] if command else arguments


def _options(**options: str) -> list[str]:
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def _forward(vm: Object) -> tuple[str, int]:
    """Where on this machine the guest's port 22 is."""
    name, status = vm["meta"]["name"], vm["status"]
    if status["phase"] not in ("running", "unresponsive"):
        raise Refused(f"{name} is {status['phase']}", code="wrong-phase", hint=f"corral start {name}")
    ports = [p for p in status.get("ports", []) if p["guest"] == 22 and p.get("protocol", "tcp") == "tcp"]
    if not ports:
        raise Refused(f"{name} has no port for ssh", code="unsupported", hint=f"corral exec -it {name} -- sh")
    port = min(ports, key=lambda p: p.get("purpose") != "ssh")
    address = port.get("address") or "127.0.0.1"
    return ("127.0.0.1" if address == "0.0.0.0" else address), port["host"]


def _default_user(session: Session, vm: Object) -> str:
    try:
        image = session.get("image", vm["spec"].get("image_id") or vm["spec"]["image"])
    except NotFound:
        return "root"
    return image["status"].get("default_user") or "root"


def _await_banner(address: str, port: int, name: str) -> None:
    """Wait until sshd introduces itself: QEMU accepts connections for a guest that does not listen yet."""
    until = time.monotonic() + BANNER_S
    while time.monotonic() < until:
        try:
            with socket.create_connection((address, port), timeout=5) as line:
                if line.recv(4) == b"SSH-":
                    return
        except OSError:
            pass  # not yet: asked again until the limit, and then said
        time.sleep(0.2)
    raise Unavailable(
        f"no ssh server answers in {name} (port {port} of this machine leads to it)",
        hint=f"corral exec -it {name} -- sh works without one; corral logs {name} shows what the guest printed",
    )
