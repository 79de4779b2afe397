"""``corral exec``: a program in a guest, with our stdin, stdout, stderr, terminal, signals and its exit status.

The main thread reads the guest's output; one thread sends stdin, another what signal handlers ask for (a handler may
interrupt a send, so it must not send by itself). Each side waits for the other: a gigabyte passes through a few
messages' worth of memory.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

import click

from corral.cli import failures, terminal
from corral.cli.command import GuestCommand
from corral.cli.parameters import DURATION, pairs
from corral.cli.session import Session
from corral.errors import CorralError, TimedOut

if TYPE_CHECKING:
    from corral.client.sync.sockets import Exec

FAILED, EXPIRED, READER_GONE = 125, 124, 128 + signal.SIGPIPE
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 2
"""So many Ctrl-C go to the guest's program; one more leaves it alone and ends us."""


class Expired(Exception):
    """Our own ``--timeout`` has passed."""


class Flooded(Exception):
    """The program printed more than it may."""


@click.command("exec", cls=GuestCommand)
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on.")
@click.option("-t", "--tty", is_flag=True, help="Give the program a terminal.")
@click.option("--user", "-u", default="", metavar="USER", help="As whom (default: root).")
@click.option("--cwd", default="", metavar="DIR", help="Where.")
@click.option("--env", "-e", multiple=True, metavar="K=V", help="A variable; may be repeated.")
@click.option("--timeout", type=DURATION, metavar="TIME", help="Kill it after this long and exit 124.")
@click.pass_obj
def exec_command(
    session: Session, name: str, command: tuple[str, ...], interactive: bool, tty: bool, user: str, cwd: str,
    env: tuple[str, ...], timeout: float | None,
) -> int:  # fmt: skip
    """Run a program in a VM; the exit status is the program's.

    128+n for a signal; 125 if Corral itself failed, 124 after --timeout.

    \b
    corral exec web -- cat /etc/os-release
    corral exec -it web -- sh
    """
    if not command:
        raise click.UsageError(f"which program? corral exec {name} -- PROGRAM [ARGUMENTS]")
    variables = pairs(env, "--env")
    if tty and "TERM" not in variables and os.environ.get("TERM"):
        variables["TERM"] = os.environ["TERM"]
    rows, columns = terminal.size()
    try:
        with session.client.vms.exec(
            name, command, env=variables, cwd=cwd, user=user, tty=tty, rows=rows, columns=columns
        ) as program:
            return attach(program, interactive=interactive, tty=tty, timeout_s=timeout)
    except Expired:
        failures.line(f"error: {command[0]} took longer than {timeout:g} s and was killed")
        return EXPIRED
    except BrokenPipeError:
        return READER_GONE
    except CorralError as error:
        failures.report(error if name in error.message else _named(error, name), as_json=session.output == "json")
        told = error.details.get("status")  # a program that the guest could not start: 126 or 127, as a shell says it
        return told if error.code == "guest" and isinstance(told, int) else FAILED


def _named(error: CorralError, name: str) -> CorralError:
    error.message = f"{name}: {error.message}"
    return error


def attach(
    program: Exec, *, interactive: bool, tty: bool, timeout_s: float | None, max_output: int | None = None
) -> int:
    """Join our standard streams to the program until it ends; its status. Raises Expired, Flooded, CorralError."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    with ExitStack() as stack:
        ask = stack.enter_context(orders())
        if tty and interactive and sys.stdin.isatty():
            stack.enter_context(terminal.raw(0))
            stack.enter_context(terminal.resizes(lambda rows, columns: ask(lambda: program.resize(rows, columns))))
        else:
            stack.enter_context(forwarded(lambda number: ask(lambda: program.signal(number))))
        if interactive:
            threading.Thread(target=send_stdin, args=(program,), daemon=True).start()
        else:
            program.eof()
        return pump(program, until, max_output)


def pump(program: Exec, until: float | None, room: int | None = None) -> int:
    """Print what the program prints, at most ``room`` bytes, until it ends; its status."""
    while True:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise Expired
        try:
            piece = program.read(left)
        except TimedOut:
            if until is not None and time.monotonic() >= until:
                raise Expired from None
            raise
        if piece is None:
            assert program.status is not None, "output ends with the status"
            return program.status
        terminal.write_all(piece.stream, piece.data if room is None else piece.data[:room])
        if room is not None:
            room -= len(piece.data)
            if room < 0:
                raise Flooded


def send_stdin(program: Exec) -> None:
    """Our stdin, to its end. The reader tells of lost connections; a program may end without reading."""
    try:
        while data := _read_stdin():
            program.write(data)
        program.eof()
    except CorralError:
        return


def _read_stdin() -> bytes:
    try:
        return os.read(0, terminal.CHUNK)
    except OSError:
        return b""  # a terminal that hung up, or a descriptor that cannot be read: the end of input


@contextmanager
def orders() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that signal handlers may call: it has another thread do what it is given."""
    queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def work() -> None:
        while (order := queue.get()) is not None:
            try:
                order()
            except CorralError:
                return  # the connection is gone; the reader tells

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield queue.put
    finally:
        queue.put(None)


@contextmanager
def forwarded(send: Callable[[int], None]) -> Iterator[None]:
    """Signals that we get go to the program, while the block runs."""
    left = PATIENCE

    def handle(number: int, _frame: object) -> None:
        nonlocal left
        if number == signal.SIGINT:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        send(number)

    before = {number: signal.signal(number, handle) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
