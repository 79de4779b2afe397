"""Errors as lines: ``error: …`` (one per problem), ``hint: …``; with ``-o json`` the problem body on stdout too."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from corral.errors import CorralError, Invalid, to_problem

if TYPE_CHECKING:
    import click

HINTS = {
    "not-found": "`corral list` shows the VMs; `corral NOUN list` shows everything else",
    "ambiguous": "give the whole id, or PROJECT/NAME",
    "exists": "choose another name, or delete the old one first",
    "conflict": "look at it again (`corral info NAME`), then repeat",
    "stale": "look at it again, then repeat",
    "wrong-phase": "`corral info NAME` shows the present phase",
    "no-capacity": "`corral host list` shows the hosts; stop or delete VMs, or ask for less",
    "invalid": "`corral explain vm.spec` lists fields, units and limits",
    "unavailable": "`corral up` starts the daemon; `corral doctor` says what is wrong",
    "timed-out": "`corral info NAME` and `corral logs NAME` show how far it came",
    "unresponsive": "`corral logs NAME` shows what the guest printed last",
    "unknown": "look at the object before you repeat anything",
    "bug": "please report it, with the daemon's log",
}


def line(text: str) -> None:
    """One line on stderr, free of control characters (messages may quote what a guest or a server said)."""
    print(clean(text), file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """``text`` with control characters escaped: a name or message must not be able to drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def report(error: CorralError, *, as_json: bool) -> int:
    """Print an error as promised; return the exit status that its code means."""
    if as_json:
        print(json.dumps(to_problem(error), indent=2, ensure_ascii=False))
    for text in messages(error):
        line(f"error: {text}")
    for text in _reasons(error):
        line(f"  {text}")
    hint = error.hint or HINTS.get(error.code, "")
    if hint:
        line(f"hint: {hint}")
    return error.exit_status


def messages(error: CorralError) -> list[str]:
    """One sentence per problem, each with its field."""
    if isinstance(error, Invalid):
        return [str(problem) for problem in error.problems]
    shown = f"{error.field}: {error.message}" if error.field and error.field not in error.message else error.message
    return [" ".join(shown.split("\n"))]


def _reasons(error: CorralError) -> list[str]:
    """What stands behind it: why each host said no, the last lines of the serial log."""
    found: list[str] = []
    hosts = error.details.get("hosts")
    if isinstance(hosts, dict):
        found += [f"{host}: {reason}" for host, reason in sorted(hosts.items())]
    elif isinstance(hosts, list):
        found += [f"{h.get('host', h.get('name', '?'))}: {h.get('reason', '')}" for h in hosts if isinstance(h, dict)]
    log = error.details.get("log") or error.details.get("serial")
    lines = log.splitlines() if isinstance(log, str) else log if isinstance(log, list) else []
    return found + [f"| {text}" for text in lines[-10:]]


def report_usage(error: click.UsageError, *, as_json: bool) -> int:
    """A wrong command line: what is wrong, what was probably meant, where the help is."""
    text = error.format_message().rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "corral"
    body = CorralError(
        text[:1].lower() + text[1:] if text[1:2].islower() else text,
        code="usage",
        hint=f"`{path} --help` shows how it is used",
    )
    return report(body, as_json=as_json)


def asked_for_json(given: list[str]) -> bool:
    """Whether a command line that may not even parse asks for JSON."""
    words = given[: given.index("--")] if "--" in given else given
    for number, word in enumerate(words):
        if word in ("-o", "--output") and number + 1 < len(words):
            return words[number + 1] == "json"
        if word in ("-ojson", "--output=json"):
            return True
    return os.environ.get("CORRAL_OUTPUT") == "json"
