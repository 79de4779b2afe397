"""What the kernel has counted: run and wait time of threads, use of VMs, idle time of the host.

Charged by measured time, never by sampling at ticks: a guest that sleeps just before each tick gains nothing. Files
stay open between readings; that halves the cost of a reading, and a thread's file never starts to mean another thread.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_NS = 1e-9
_STAT_LINE = 224
"""Bytes of a CPU's line in /proc/stat at most: a name and ten numbers."""


class Times(NamedTuple):
    """Seconds since the thread began: it ran, and it was runnable but did not run."""

    run: float
    wait: float


class Counter:
    """A small file of the kernel that is read again and again. ``read`` is None when its process is gone."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes | None:
        try:
            return os.pread(self._fd, 512, 0)
        except ProcessLookupError:
            return None

    def close(self) -> None:
        os.close(self._fd)


class ThreadClock:
    """Run and wait time of one thread (/proc/PID/task/TID/schedstat). Raises FileNotFoundError when it is gone."""

    def __init__(self, pid: int, tid: int) -> None:
        self.tid = tid
        self._counter = Counter(Path(f"/proc/{pid}/task/{tid}/schedstat"))
        self._state = Counter(Path(f"/proc/{pid}/task/{tid}/stat"))
        self._last = Times(0.0, 0.0)

    def read(self) -> Times:
        """The last times that were seen stay when the thread has ended."""
        text = self._counter.read()
        if text:
            run, wait, *_ = text.split()
            self._last = Times(int(run) * _NS, int(wait) * _NS)
        return self._last

    def runnable(self) -> bool:
        """It runs or waits to run at this moment."""
        text = self._state.read()
        return text is not None and text[text.rindex(b")") + 2 : text.rindex(b")") + 3] == b"R"

    def close(self) -> None:
        self._counter.close()
        self._state.close()


class ProcessClock:
    """CPU time of a whole process, for VMs without a cgroup: vCPU threads, and the others by clock ticks of 10 ms."""

    def __init__(self, pid: int) -> None:
        self._counter = Counter(Path(f"/proc/{pid}/stat"))
        self._last = 0.0

    def read(self) -> float:
        text = self._counter.read()
        if text:
            fields = text[text.rindex(b")") + 2 :].split()
            self._last = (int(fields[11]) + int(fields[12])) * _TICK_S
        return self._last

    def close(self) -> None:
        self._counter.close()


class IdleClock:
    """Core-seconds in which some CPUs had nothing to do (waiting for a disk counts as nothing to do)."""

    def __init__(self, cpus: list[int]) -> None:
        self._wanted = {f"cpu{number}".encode() for number in cpus}
        self._fd = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._size = _STAT_LINE * (max(cpus) + 2)

    def read(self) -> float:
        total = 0
        for line in os.pread(self._fd, self._size, 0).splitlines():
            if line[: line.find(b" ")] in self._wanted:
                fields = line.split()
                total += int(fields[4]) + int(fields[5])
            elif total:
                break
        return total * _TICK_S

    def close(self) -> None:
        os.close(self._fd)


def physical(cpus: list[int], where: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """The physical core of each CPU, by its lowest CPU; its own where the kernel does not say."""
    found = []
    for cpu in cpus:
        try:
            siblings = (where / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
            found.append(int(siblings.strip().replace("-", ",").partition(",")[0]))
        except (OSError, ValueError):
            found.append(cpu)
    return found


def nodes(cpus: list[int], where: Path = Path("/sys/devices/system/node")) -> list[int]:
    """The NUMA node of each CPU; 0 where the kernel does not say."""
    found = {}
    for path in where.glob("node[0-9]*/cpu[0-9]*"):
        found[int(path.name[3:])] = int(path.parent.name[4:])
    return [found.get(cpu, 0) for cpu in cpus]
