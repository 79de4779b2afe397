"""Processes of this host, told apart for good: boot id, pidfd, start time, command line.

A pid alone names nothing (it is reused). A process is opened as a pidfd first and its start time compared afterwards:
then every signal through that pidfd reaches that process or nobody.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")


class Stat(NamedTuple):
    """The part of /proc/PID/stat that is of use."""

    state: str
    """One letter: ``R`` ``S`` ``D`` ``T`` (stopped) ``Z`` (ended, not yet waited for) …"""
    parent: int
    start: int
    """Clock ticks after boot: with the pid and the boot id it names a process for ever."""
    cpu_s: float
    """User and system time used by all threads, seconds."""


def stat(pid: int) -> Stat | None:
    """What the kernel says of ``pid``; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold anything, even ") "
    return Stat(fields[0], int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / _TICKS)


def boot_id() -> str:
    """Changes with every boot of the host: what was learned under another one (pids, probes) is void."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def threads(pid: int) -> dict[int, int]:
    """The threads of ``pid``: number in its own pid namespace → number here. Empty when it is gone."""
    found = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError):  # a thread that ends meanwhile
            line = next(line for line in status.read_text().splitlines() if line.startswith("NSpid:"))
            found[int(line.split()[-1])] = int(status.parent.name)
    return found


def command_line(pid: int) -> list[bytes]:
    """The arguments of ``pid``; empty when it is gone or a kernel thread."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return raw.split(b"\0")[:-1]


def working_directory(pid: int) -> str:
    """Where ``pid`` stands; empty when it is gone or belongs to somebody else."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""


def pids() -> Iterator[int]:
    """Every process there is now."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def with_arguments(first: bytes, second: bytes) -> Iterator[int]:
    """Every process that has these two arguments next to each other (like ``-uuid`` and a value)."""
    needle = b"\0" + first + b"\0" + second + b"\0"
    for pid in pids():
        try:
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if needle in raw:
            yield pid


def open_pidfd(pid: int, start: int) -> int | None:
    """A pidfd of the process ``pid`` that started at ``start`` (see :class:`Stat`); None when that one is gone.

    One that has ended and was not waited for yet still counts: its end can be read from the pidfd.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    now = stat(pid)
    if now is None or now.start != start:
        os.close(fd)
        return None
    return fd


def send(pidfd: int, number: int) -> bool:
    """Signal the process behind a pidfd; False when it is gone already."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True
