"""``corral launch IMAGE``: one command from nothing to a VM that answers.

The image comes first, if it is not here yet (:mod:`corral.cli.obtain`). Then one request makes all the VMs, and one
wait sees them up.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from corral.cli import failures
from corral.cli.command import Command
from corral.cli.obtain import ensure_image
from corral.cli.output import Object, print_json, print_list
from corral.cli.parameters import DURATION, SHARE, SIZE, pairs
from corral.cli.session import Session
from corral.cli.wait import Waiting
from corral.errors import CorralError, Invalid, Problem
from corral.model.kinds import KINDS
from corral.model.patch import keys

MAX_USER_DATA = 64 << 10
SIZES = ("size", "bandwidth", "bandwidth_burst", "rate", "memory_budget", "memory.reserve")
"""Fields that hold bytes, or bytes a second: ``512M``. The last word of a path tells them, or the last two."""
SHARES = ("limit", "reserve", "cpu_limit", "cpu_reserve", "memory_overcommit")
"""Fields that hold cores or ratios: ``0.5`` or ``50%``."""
vm_options = [
    click.Option(["--name", "-n"], help="Its name (default: one is made up). With --count: NAME-1, NAME-2, …"),
    click.Option(["--count"], type=click.IntRange(1), metavar="K", help="Make several alike."),
    click.Option(["--flavor"], metavar="F", help="A plan: `corral flavor list`."),
    click.Option(["--cpus"], type=int, metavar="N", help="Virtual CPUs."),
    click.Option(["--memory", "-m"], type=SIZE, metavar="SIZE", help="Memory, like 512M."),
    click.Option(["--disk"], type=SIZE, metavar="SIZE", help="Root disk, like 5G (default: the image's own size)."),
    click.Option(["--network"], metavar="NET", help="Network of its card (default: user)."),
    click.Option(
        ["--publish", "-p"],
        multiple=True,
        metavar="HOST:GUEST",
        help="Publish a port, like 8080:80 or 0:53/udp (0: any).",
    ),
    click.Option(["--user-data"], metavar="FILE", help="cloud-init user data; - is stdin."),
    click.Option(["--ssh-key"], multiple=True, metavar="FILE", help="A public key that may log in; may be repeated."),
    click.Option(["--label", "-l"], multiple=True, metavar="K=V", help="A label; may be repeated."),
    click.Option(["--cold"], is_flag=True, help="Boot it, even where a template would have it up much sooner."),
    click.Option(["--set", "assign"], multiple=True, metavar="PATH=VALUE", help="Any field: `corral explain vm.spec`."),
    click.Option(["--dry-run"], is_flag=True, help="Check everything, show what would be made, make nothing."),
]


@click.command("launch", cls=Command)
@click.argument("image")
@click.option("--wait/--no-wait", default=True, help="Return when the guest answers (default), or at once.")
@click.option("--timeout", type=DURATION, metavar="TIME", help="Longest time until the guest answers (default: 120s).")
@click.pass_obj
def launch(session: Session, /, image: str, wait: bool, timeout: float | None, dry_run: bool, **options: Any) -> int:
    """Make a VM from IMAGE, start it, and say how to get in.

    \b
    corral launch debian --name web --memory 1G --publish 8080:80
    corral launch micro --count 3 --name node
    """
    body = request(image, options)
    ensure_image(session, image, quiet=dry_run)
    accepted = session.create("vm", dry_run=dry_run, timeout_s=timeout, **body)
    if dry_run or not wait:
        show_vms(
            session, accepted.items, single=options["count"] is None, note="would be made" if dry_run else "is starting"
        )
        return 0
    waiting = Waiting(session, accepted.tasks)
    errors = waiting.run(None if timeout is None else timeout + 10)
    vms = [session.get("vm", vm["meta"]["id"]) for vm in accepted.items]
    if not errors:
        show_vms(session, vms, single=options["count"] is None)
        return 0
    return failed(session, vms, errors)


launch.params += vm_options


def request(image: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The request's parts (name, labels, count, spec) from the flags. Raises Invalid, usage errors."""
    spec: dict[str, Any] = {"image": image}
    if options["flavor"]:
        spec["flavor"] = options["flavor"]
    if options["cpus"] is not None:
        spec["cpu"] = {"count": options["cpus"]}
    for part in ("memory", "disk"):
        if options[part] is not None:
            spec[part] = {"size": options[part]}
    if options["network"] or options["publish"]:
        nic: dict[str, Any] = {"network": options["network"] or "user"}
        if options["publish"]:
            nic["publish"] = [forward(text) for text in options["publish"]]
        spec["nics"] = [nic]
    if options["user_data"]:
        spec["user_data"] = user_data(options["user_data"])
    if options["ssh_key"]:
        spec["ssh_keys"] = [key for path in options["ssh_key"] for key in public_keys(path)]
    if options.get("cold"):
        spec["cold"] = True
    for word in options["assign"]:
        assign(spec, word)
    return {
        "name": options["name"], "labels": pairs(options["label"], "--label"), "count": options["count"], "spec": spec,
    }  # fmt: skip


def forward(text: str) -> dict[str, Any]:
    """``[ADDRESS:]HOST:GUEST[/udp]`` as a forward. Raises a usage error."""
    ports, _, protocol = text.partition("/")
    words = ports.split(":")
    numbers = words[-2:]
    if (
        len(words) not in (2, 3)
        or protocol not in ("", "tcp", "udp")
        or not all(n.isascii() and n.isdigit() for n in numbers)
    ):
        raise click.BadParameter(f"{text!r} is not HOST:GUEST, like 8080:80 or 5353:53/udp", param_hint="--publish")
    found: dict[str, Any] = {"host": int(numbers[0]), "guest": int(numbers[1])}
    return found | ({"protocol": protocol} if protocol else {}) | ({"address": words[0]} if len(words) == 3 else {})


def user_data(path: str) -> str:
    """The text of a user-data file, or of stdin for ``-``. Raises Invalid."""
    return _text(path, "spec.user_data", MAX_USER_DATA)


def public_keys(path: str) -> list[str]:
    """The keys of an OpenSSH public key file. Raises Invalid, also for a private key given by mistake."""
    text = _text(path, "spec.ssh_keys", 64 << 10)
    if "PRIVATE KEY" in text:
        raise Invalid([Problem("spec.ssh_keys", f"{path} is a private key", f"the public one: {path}.pub")])
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _text(path: str, field: str, limit: int) -> str:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(limit + 1)
        elif Path(path).is_file():
            with Path(path).open("rb") as file:
                data = file.read(limit + 1)
        else:
            raise Invalid([Problem(field, f"{path} is no file" if Path(path).exists() else f"there is no file {path}")])
    except OSError as error:
        raise Invalid([Problem(field, f"{path}: {error.strerror}")]) from error
    if len(data) > limit:
        raise Invalid([Problem(field, f"{path} is larger than {limit >> 10} KiB")])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Invalid([Problem(field, f"{path} is not UTF-8 text")]) from error


def assign(spec: dict[str, Any], word: str, flag: str = "--set") -> None:
    """Set ``path=value`` in a spec; numbers, true, false, none, sizes, shares are recognised. Raises usage errors."""
    path, equals, text = word.partition("=")
    words = keys(path)
    if not equals or not all(words):
        raise click.BadParameter(f"{word!r} is not PATH=VALUE", param_hint=flag)
    place: Any = spec
    for key in words[:-1]:
        if isinstance(place, dict):
            place = place.setdefault(key, {})
        elif isinstance(place, list) and key.isascii() and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        else:
            raise click.BadParameter(f"there is no {path}", param_hint=flag)
    if not isinstance(place, dict):
        raise click.BadParameter(f"{path} lies inside a list; lists have flags of their own", param_hint=flag)
    place[words[-1]] = _value(words, text)


def _value(words: Sequence[str], text: str) -> Any:
    key = words[-1]
    if text in ("none", "null"):
        return None
    if key in SIZES or ".".join(words[-2:]) in SIZES:
        return SIZE.convert(text.removesuffix("/s"), None, None)
    if key in SHARES:
        return SHARE.convert(text, None, None)
    if text in ("true", "false"):
        return text == "true"
    number = text.removeprefix("-")
    if number.isascii() and number.isdigit() and len(number) < 19:
        return int(text)
    return text


def show_vms(session: Session, vms: Sequence[Object], *, single: bool, note: str = "") -> None:
    """VMs that have just been made. ``note``: they are not up yet; ``single``: one was asked for."""
    from corral.cli.describe import launched, scoped_name, ways_in

    if session.output == "json":
        print_json(vms[0] if single and len(vms) == 1 else vms)
    elif session.output in ("name", "wide"):
        print_list(KINDS["vm"], vms, session.output)
    else:
        for vm in vms:
            print(f"{scoped_name(vm)} {note}" if note else launched(vm))
        if not note and len(vms) <= 3:
            print("\n".join(text for vm in vms for text in ways_in(vm)))


def failed(session: Session, vms: Sequence[Object], errors: list[CorralError]) -> int:
    """Say which came up and which did not; for those, what the guest printed last."""
    if session.output == "table":
        for vm in vms:
            if vm["status"]["phase"] == "running":
                print(f"{vm['meta']['name']} is running")
    for error in errors:
        failures.report(error, as_json=session.output == "json" and error is errors[0])
    for vm in [v for v in vms if v["status"]["phase"] != "running"][:3]:
        show_serial_end(session, vm)
    return max(error.exit_status for error in errors)


def show_serial_end(session: Session, vm: Object) -> None:
    """The last lines of a VM's serial log, on stderr; nothing if there is none."""
    try:
        text = session.log(vm["meta"]["id"], 4096).decode(errors="replace")
    except CorralError:
        return  # the error that brought us here has been told; a VM that never started has no log
    lines = [line for line in text.replace("\r", "").split("\n") if line.strip()][-8:]
    if lines:
        failures.line(f"the last lines on the serial console of {vm['meta']['name']}:")
        for line in lines:
            failures.line(f"  | {line}")
