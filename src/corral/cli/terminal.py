"""The terminal of a person at a console: raw while we use it, restored always, its size and its changes."""

from __future__ import annotations

import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from corral.units import KIB

CHUNK = 64 * KIB


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Keys arrive one by one and unchanged while the block runs; then all is as it was, after SIGTERM too."""
    before = termios.tcgetattr(descriptor)
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds through raw(), which restores the terminal


def size() -> tuple[int, int]:
    """Rows and columns of the terminal; 24×80 where there is none."""
    for descriptor in (0, 1, 2):
        try:
            found = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if found.lines and found.columns:
            return found.lines, found.columns
    return 24, 80


@contextmanager
def resizes(told: Callable[[int, int], None]) -> Iterator[None]:
    """Call ``told(rows, columns)`` when the window changes: in a signal handler, so it may only queue."""
    before = signal.signal(signal.SIGWINCH, lambda *_: told(*size()))
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def write_all(descriptor: int, data: bytes) -> None:
    """All of ``data``, past Python's buffers: what a guest prints must be seen when it comes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
