"""One start of a guest, as figures."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Started(NamedTuple):
    """Seconds from just before the request. ``answer``: the guest's agent answers. ``identity``: the guest is somebody
    of its own. ``whole``: of a command, until it ended. ``cpu``: CPU seconds of all processes until then. ``own``: bytes
    of memory that are QEMU's alone then. None: this arm has no such thing."""

    answer: float | None = None
    identity: float | None = None
    whole: float | None = None
    cpu: float | None = None
    own: int | None = None


def cpu_of(pids: Iterable[int]) -> float:
    """CPU seconds of processes, of their threads that ended, and of the children that they have waited for."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile: whoever waited for it has its time
        ticks += sum(int(fields[place]) for place in (11, 12, 13, 14))
    return ticks / os.sysconf("SC_CLK_TCK")


def children_cpu() -> float:
    """CPU seconds of this process's own children that ended: commands."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def anonymous(pid: int) -> int:
    """Bytes that a process has of its own. (A template's page that only one fork maps counts as private elsewhere.)"""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10
