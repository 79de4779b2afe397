"""``corral console``: a VM's serial line. A person gets a raw terminal; a script sends stdin and waits for a text."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from corral.cli import failures, terminal
from corral.cli.command import Command
from corral.cli.exec import orders
from corral.cli.parameters import DURATION
from corral.cli.session import Session
from corral.errors import CorralError, TimedOut, Unavailable

if TYPE_CHECKING:
    from corral.client.sync.sockets import Console

ESCAPE = 0x1D  # Ctrl-]
LEAVE = b"q."
QUIET_S = 1.0
"""A script's session ends when its stdin has ended and the guest was silent for so long."""
UNTIL_S = 60.0
"""Longest wait for ``--until`` if no ``--timeout`` is given: a script must not hang for ever."""


class Keys:
    """Keys on their way to the guest, with our escape taken out: Ctrl-] q leaves, Ctrl-] Ctrl-] sends one."""

    def __init__(self) -> None:
        self._escaped = False
        self.left = False

    def feed(self, data: bytes) -> bytes:
        """What the guest is to get of ``data``; sets ``left`` when the person wants out (and takes nothing more)."""
        through = bytearray()
        for key in data:
            if self._escaped:
                self._escaped = False
                if key in LEAVE:
                    self.left = True
                    break
                if key != ESCAPE:
                    through.append(ESCAPE)
                through.append(key)
            elif key == ESCAPE:
                self._escaped = True
            else:
                through.append(key)
        return bytes(through)


@click.command("console", cls=Command)
@click.argument("name")
@click.option("--until", metavar="TEXT", help="In a script: end when the guest has printed TEXT.")
@click.option("--timeout", type=DURATION, metavar="TIME", help="In a script: end after this long.")
@click.pass_obj
def console(session: Session, name: str, until: str | None, timeout: float | None) -> int:
    """A VM's serial console. Leave it with Ctrl-] and then q.

    When stdin is no terminal, it is sent to the guest and what the guest prints comes out, until stdin has ended and
    the guest is silent, or TEXT was printed.
    """
    with session.client.vms.console(name) as line:
        if sys.stdin.isatty() and until is None:
            return interactive(line, name)
        return scripted(line, until.encode() if until is not None else None, timeout)


def interactive(line: Console, name: str) -> int:
    """A person at the console, until the escape or the end of the line."""
    failures.line(f"the console of {name}; leave it with Ctrl-] and then q")
    keys = Keys()
    with ExitStack() as stack:
        stack.enter_context(terminal.raw(0))
        ask = stack.enter_context(orders())
        stack.enter_context(terminal.resizes(lambda rows, columns: ask(lambda: line.resize(rows, columns))))
        ask(lambda: line.resize(*terminal.size()))
        threading.Thread(target=_type, args=(line, keys), daemon=True).start()
        try:
            for data in line:
                terminal.write_all(1, data)
        except CorralError:
            if not keys.left:
                raise
        finally:
            terminal.write_all(2, b"\r\n")
    failures.line("left the console" if keys.left else "the serial line has closed")
    return 0


def _type(line: Console, keys: Keys) -> None:
    """Keys to the guest; closes the line when the person leaves."""
    try:
        while data := os.read(0, 1024):
            through = keys.feed(data)
            if through:
                line.write(through)
            if keys.left:
                break
    except (OSError, CorralError):
        pass  # the terminal hung up, or the connection is gone: the reader tells
    line.close()


def scripted(line: Console, until: bytes | None, timeout_s: float | None) -> int:
    """Send stdin, print what comes. Raises TimedOut if ``until`` has not come in time."""
    sent = threading.Event()
    threading.Thread(target=_send, args=(line, sent), daemon=True).start()
    limit = timeout_s if timeout_s is not None else UNTIL_S if until is not None else None
    seen = b""
    for data in _until_quiet(line, sent, limit, patient=until is not None):
        terminal.write_all(1, data)
        if until is not None:
            seen = (seen + data)[-max(1 << 16, 2 * len(until)) :]
            if until in seen:
                return 0
    if until is None:
        return 0
    text = ascii(until.decode(errors="replace"))
    raise TimedOut(f"the guest did not print {text}" + (f" within {limit:g} s" if limit is not None else ""))


def _until_quiet(line: Console, sent: threading.Event, limit_s: float | None, *, patient: bool) -> Iterator[bytes]:
    """What the guest prints; ends at the limit, when the line closes, or (unless patient) after a silence."""
    begun = heard = time.monotonic()
    while True:
        now = time.monotonic()
        if limit_s is not None and now - begun >= limit_s:
            return
        if not patient and sent.is_set() and now - heard >= QUIET_S:
            return
        try:
            data = line.read(0.1)
        except TimedOut:
            continue
        if not data:
            return
        heard = time.monotonic()
        yield data


def _send(line: Console, sent: threading.Event) -> None:
    try:
        while data := os.read(0, 4096):
            line.write(data)
    except (OSError, Unavailable):
        pass  # stdin cannot be read, or the connection is gone: the reader tells
    sent.set()
