"""What a process of this host costs. Who it is (pid, start time, pidfd) is :mod:`corral.runtime.process`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from corral.runtime.process import stat


class Memory(NamedTuple):
    """Bytes. ``anonymous`` is what the process owns alone; ``pss`` adds its part of shared pages, files included."""

    rss: int
    pss: int
    anonymous: int


class Cost(NamedTuple):
    """``cpu_s``: user and system time of all its threads so far, seconds."""

    cpu_s: float
    memory: Memory


def memory(pid: int) -> Memory | None:
    """What ``pid`` holds; None when it is gone or belongs to somebody else."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in text.splitlines()[1:])}
    return Memory(kib.get("Rss", 0) << 10, kib.get("Pss", 0) << 10, kib.get("Anonymous", 0) << 10)


def own(pid: int) -> int | None:
    """Bytes of memory that nobody else has, as the kernel counts them anyway (no page table is walked): of a QEMU its
    guest's memory, as far as it was touched and not given back, and its own. None as :func:`memory`."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), None)


def held(pid: int) -> int | None:
    """Bytes of this host's memory that ``pid`` accounts for, shared pages in part; None as :func:`memory`."""
    known = memory(pid)
    return None if known is None else known.pss


def cost(pid: int) -> Cost | None:
    """CPU time and memory of ``pid``; None when it is gone or belongs to somebody else."""
    now, held = stat(pid), memory(pid)
    return None if now is None or held is None else Cost(now.cpu_s, held)
