"""``corral vm explain``: why a VM is slow, or why it does not run, in sentences with numbers and what to do."""

from __future__ import annotations

import click

from corral.cli.command import Command
from corral.cli.failures import clean
from corral.cli.output import Object, coloured, print_json, shown, table
from corral.cli.session import Session
from corral.units import format_size

_COLOURS = {"limits": "31", "slows": "33", "fine": "32"}


@click.command("explain", cls=Command)
@click.argument("name")
@click.pass_obj
def explain(session: Session, name: str) -> None:
    """Why a VM is slow, or does not run: what limits it now, with numbers and what to do.

    `limits` holds it back now, `slows` is so whatever it does, `fine` means that the platform is not the reason.
    -o wide adds what every host says to it; -o name prints only the codes, for scripts.

    \b
    corral vm explain web
    corral vm explain web -o json
    """
    body: Object = session.explain(name)
    if session.output == "json":
        print_json(body)
    elif session.output == "name":
        print("\n".join(clean(finding["code"]) for finding in body["findings"]))
    else:
        print(in_words(body, hosts=session.output == "wide" or not body["host"]))


def in_words(body: Object, *, hosts: bool) -> str:
    """The whole answer; ``hosts``: with what each host says."""
    lines = [clean(body["summary"])]
    for finding in body["findings"]:
        effect = f"{finding['effect']:6}"
        if coloured():
            effect = f"\x1b[{_COLOURS.get(finding['effect'], '0')}m{effect}\x1b[0m"
        lines.append(f"  {effect}  {clean(finding['message'])}")
        if finding["hint"]:
            lines.append(f"          hint: {clean(finding['hint'])}")
    if body["events"]:
        rows = [[shown(e["at"], "time"), clean(e["reason"]), clean(e["message"]) or "-"] for e in body["events"]]
        lines += ["", *table(["LAST EVENTS", "REASON", "MESSAGE"], rows).splitlines()]
    if hosts:
        rows = [[clean(h["host"]), "yes" if h["fits"] else "no", clean(h["reason"]) or "-"] for h in body["hosts"]]
        need = f"needs {format_size(body['need']['memory'])} of memory and {body['need']['cpus']} CPU"
        lines += ["", need, *(table(["HOST", "FITS", "REASON"], rows).splitlines() if rows else ["there is no host"])]
    return "\n".join(lines)
