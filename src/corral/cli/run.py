"""``corral run``: a program in a VM of its own, which is gone afterwards."""

from __future__ import annotations

import os
from typing import Any

import click

from corral.cli import failures, terminal
from corral.cli.command import GuestCommand
from corral.cli.exec import EXPIRED, FAILED, READER_GONE, Expired, Flooded, attach
from corral.cli.mount import parse_mount
from corral.cli.parameters import DURATION, SIZE, OrNone, pairs
from corral.cli.session import Session
from corral.cli.throwaway import USUAL, Copy, Plan, Throwaway, ended_by_signals, throwaway
from corral.cli.timings import Timings
from corral.client.held import MAX_OUTPUT
from corral.client.record import KILLED
from corral.errors import CorralError
from corral.units import MIB, format_duration, format_size

EACH_OUTPUT = 1 * MIB
"""What a run of --each may print, if nothing else is said: it is kept until its turn to be shown."""


@click.command("run", cls=GuestCommand)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on.")
@click.option("-t", "--tty", is_flag=True, help="Give the program a terminal.")
@click.option("--rm/--keep", "remove", default=True, help="Delete the VM afterwards (default), or keep it running.")
@click.option("--name", "-n", help="The VM's name (default: one is made up).")
@click.option("--cp", "before", multiple=True, metavar="HOST:GUEST", help="Copy a file or directory in, before.")
@click.option("--cp-out", "after", multiple=True, metavar="GUEST:HOST", help="Copy a file or directory out, after.")
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="DIR[:GUEST][:ro]",
    help="A directory as a copy in the guest (default: /mnt/NAME); unless ro, what changed comes back afterwards.",
)
@click.option("--env", "-e", multiple=True, metavar="K=V", help="A variable; may be repeated.")
@click.option("--user", "-u", default="", metavar="USER", help="As whom (default: root).")
@click.option("--cwd", "-w", default="", metavar="DIR", help="Where in the guest.")
@click.option(
    "--net", default="none", metavar="NET", help="none (default), or a network: user reaches what this machine does."
)
@click.option("--timeout", type=DURATION, metavar="TIME", help="Kill the program after this long and exit 124.")
@click.option(
    "--start-timeout",
    type=DURATION,
    default="120s",
    metavar="TIME",
    help="Longest time until the guest answers (default: 120s).",
)
@click.option(
    "--max-output",
    type=OrNone(SIZE),
    metavar="SIZE",
    help="Kill the program when it has printed more and exit 137 (default: 64M; with -t and for none: no limit).",
)
@click.option(
    "--processes",
    type=OrNone(click.IntRange(1)),
    metavar="N",
    help="How many processes the program may have at once (default: 1024; none: no limit).",
)
@click.option("--cpus", type=int, metavar="N", help="Virtual CPUs.")
@click.option("--memory", "-m", type=SIZE, metavar="SIZE", help="The VM's memory, like 512M.")
@click.option("--disk", type=SIZE, metavar="SIZE", help="Its root disk (default: the image's own size).")
@click.option("--flavor", metavar="F", help="A plan: `corral flavor list`.")
@click.option("--set", "assign_", multiple=True, metavar="PATH=VALUE", help="Any field: `corral explain vm.spec`.")
@click.option(
    "--each", metavar="FILE", help="A run for each line: {} in COMMAND is the line, else stdin is; - is stdin."
)
@click.option(
    "--jobs", "-j", type=click.IntRange(1), metavar="N", help="With --each: runs at once (default: one a core)."
)
@click.option("--fail-fast", is_flag=True, help="With --each: the first run that fails ends all.")
@click.option("--timings", is_flag=True, help="Say on stderr where the time went; with --each: median and p90.")
@click.pass_obj
def run(session: Session, /, image: str, command: tuple[str, ...], timings: bool, **options: Any) -> int:
    """Run a program in a VM of its own; the exit status is the program's.

    The VM has no network unless --net says so, and is deleted afterwards, whatever happens to this command.
    Exit: 128+n for a signal, 124 after --timeout, 137 after --max-output, 126 or 127 if the program cannot be
    started, 125 if Corral or the VM failed.

    \b
    corral run debian -- python3 -c 'print(6 * 7)'
    corral run -it debian -- bash
    corral run --each hosts.txt -j 4 debian -- sh -c 'echo {} | sha256sum'
    corral run --mount .:/src -w /src debian -- make
    """
    plan = planned(image, command, options)
    stages = Timings()
    each = options["each"]
    try:
        with ended_by_signals():
            if each is not None:
                from corral.cli.each import run_each

                many = {"jobs": options["jobs"], "fail_fast": options["fail_fast"], "timings": timings}
                return run_each(session, plan, each, **many)
            status = _run(session, plan, stages)
    except BrokenPipeError:
        return READER_GONE
    except OSError as error:  # of a file here that was to go in, or to come out
        where = f"{error.filename}: " if error.filename else ""
        failures.report(CorralError(f"{where}{error.strerror or error}"), as_json=session.output == "json")
        return FAILED
    except CorralError as error:
        if each is not None and error.code == "usage":  # a file of lines that cannot be read
            raise
        failures.report(error, as_json=session.output == "json")
        told = error.details.get("status")  # a program that the guest could not start: 126 or 127, as a shell says it
        return told if error.code == "guest" and isinstance(told, int) else FAILED
    if timings:
        stages.report()
    return status


def planned(image: str, command: tuple[str, ...], options: dict[str, Any]) -> Plan:
    """The plan that the flags mean. Raises usage errors."""
    if not command:
        raise click.UsageError(f"which program? corral run {image} -- PROGRAM [ARGUMENTS]")
    variables = pairs(options["env"], "--env")
    tty = options["tty"]
    if tty and "TERM" not in variables and os.environ.get("TERM"):
        variables["TERM"] = os.environ["TERM"]
    most, many = options["max_output"], options["processes"]
    spec: dict[str, Any] = {}
    if options["assign_"]:
        from corral.cli.launch import assign

        for word in options["assign_"]:
            assign(spec, word)
    return Plan(
        image=image, argv=command, name=options["name"], keep=not options["remove"], env=variables,
        vm={name: options[name] for name in ("net", "cpus", "memory", "disk", "flavor")} | {"spec": spec},
        cwd=options["cwd"], user=options["user"], tty=tty, interactive=options["interactive"],
        start_timeout_s=options["start_timeout"], timeout_s=options["timeout"],
        processes=many.value if many is not None else USUAL,
        max_output=most.value if most is not None else None if tty else EACH_OUTPUT if options["each"] else MAX_OUTPUT,
        mounts=tuple(parse_mount(word) for word in options["mounts"]),
        before=tuple(copied(word, "--cp") for word in options["before"]),
        after=tuple(copied(word, "--cp-out") for word in options["after"]),
    )  # fmt: skip


def copied(word: str, flag: str) -> Copy:
    """``SOURCE:TARGET``; the side in the guest is absolute. Raises a usage error."""
    # A path here may hold a colon, one in the guest begins with a slash: so there is one way to read it.
    source, colon, target = word.rpartition(":") if flag == "--cp" else word.partition(":")
    inner = target if flag == "--cp" else source
    if not colon or not source or not target or not inner.startswith("/"):
        form = "HOST:/GUEST" if flag == "--cp" else "/GUEST:HOST"
        raise click.BadParameter(f"{word!r} is not {form}", param_hint=flag)
    return Copy(source, target)


def _run(session: Session, plan: Plan, stages: Timings) -> int:
    client = session.client
    stages.mark("starting this command")
    with throwaway(session, client, plan, stages) as one:
        if plan.before or plan.mounts:
            one.copy_in()
            stages.mark("copying in")
        status = _program(one, plan)
        stages.mark("the program")
        if plan.after or plan.mounts:
            one.copy_out()
            stages.mark("copying out")
    return status


def _program(one: Throwaway, plan: Plan) -> int:
    """The program's status, or that of its end by us, which is then said."""
    try:
        with one.program(*terminal.size()) as program:
            status = attach(
                program, interactive=plan.interactive, tty=plan.tty, timeout_s=plan.timeout_s,
                max_output=plan.max_output,
            )  # fmt: skip
            if program.crowded:
                failures.line(f"note: {plan.argv[0]} wanted more than {one.processes} processes (--processes)")
            return status
    except Expired:
        assert plan.timeout_s is not None
        failures.line(f"error: {plan.argv[0]} took longer than {format_duration(plan.timeout_s)} and was killed")
        return EXPIRED
    except Flooded:
        assert plan.max_output is not None
        failures.line(f"error: {plan.argv[0]} printed more than {format_size(plan.max_output)} and was killed")
        failures.line("hint: --max-output SIZE allows more, none allows everything")
        return KILLED
