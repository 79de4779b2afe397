"""``corral doctor``: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import click

from corral.cli.command import Command
from corral.cli.failures import clean
from corral.cli.output import coloured, print_json
from corral.cli.session import Session
from corral.errors import CorralError

_MARKS = {True: ("ok", "32"), False: ("FAIL", "31"), "warn": ("warn", "33")}


@click.command("doctor", cls=Command)
@click.pass_obj
def doctor(session: Session) -> int:
    """What works here and what does not. Fails if something that VMs need is missing."""
    try:
        checks = session.client.doctor()
        checks.insert(0, _check("daemon", True, f"answers at {session.client.http.address.text}"))
    except CorralError as error:
        if session.url:
            raise
        # The daemon is what is broken: say what can be said without it.
        checks = [_check("daemon", False, error.message, error.hint), *_without_daemon()]
    if session.output == "json":
        print_json(checks)
    elif session.output == "name":
        print("\n".join(clean(check["name"]) for check in checks))
    else:
        for check in checks:
            _print(check)
    return 1 if any(check["ok"] is False for check in checks) else 0


def _check(name: str, ok: bool | str, message: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": hint}


def _without_daemon() -> list[dict[str, Any]]:
    def program(name: str, package: str) -> dict[str, Any]:
        found = shutil.which(name)
        return _check(
            name, found is not None, found or f"{name} is not installed", "" if found else f"apt install {package}"
        )

    version = ".".join(map(str, sys.version_info[:3]))
    return [
        _check("python", sys.version_info >= (3, 11), f"Python {version} at {sys.executable}"),
        program(f"qemu-system-{os.uname().machine}", "qemu-system"),
        program("qemu-img", "qemu-utils"),
    ]


def _print(check: dict[str, Any]) -> None:
    mark, colour = _MARKS.get(check["ok"], ("warn", "33"))
    shown = f"\x1b[{colour}m{mark:4}\x1b[0m" if coloured() else f"{mark:4}"
    print(f"{shown}  {clean(check['name'])}: {clean(check['message'])}")
    if check.get("hint") and check["ok"] is not True:
        print(f"      hint: {clean(check['hint'])}")
