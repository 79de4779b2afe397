"""What VMs used, what they were entitled to, and how far apart the two are."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from corral.scheduler.shares.fill import fill

SAMPLE_S = 0.1
CORES = len(os.sched_getaffinity(0))
Floats = NDArray[np.float64]


class Guest:
    """A running guest: its QEMU, and how many CPUs it has."""

    def __init__(self, name: str, pid: int, id: str = "", cpus: int = 1) -> None:
        self.name, self.pid, self.id, self.cpus = name, pid, id, cpus

    def times(self) -> tuple[float, float]:
        """Seconds that its threads ran, and waited to run."""
        run = wait = 0
        for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            one, other, _ = path.read_text().split()
            run, wait = run + int(one), wait + int(other)
        return run * 1e-9, wait * 1e-9

    def affinity(self, cpus: set[int]) -> None:
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cpus)


class Sampled(NamedTuple):
    """Samples × guests, seconds: ``run`` and ``wait``. Parts of all CPU time: ``idle``, and ``other`` programs'."""

    run: Floats
    wait: Floats
    idle: float
    other: float


@contextmanager
def exact() -> Iterator[None]:
    """Real-time priority above the governor's while it measures, where that may be had."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))
    except PermissionError:
        print("no real-time priority: windows may be inexact", file=sys.stderr)
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class Ahead:
    """How much all guests together weigh against other programs while they are measured. 0: as they are. More: as on a
    host that has nothing else to do, for machines that have. Control groups of version 1 only."""

    processes = 0

    @classmethod
    @contextmanager
    def of(cls, guests: list[Guest]) -> Iterator[None]:
        rows = [row.split(":", 2) for row in Path(f"/proc/{guests[0].pid}/cgroup").read_text().splitlines()]
        top = next((path.split("/")[1] for _, controllers, path in rows if controllers == "cpu"), "")
        file = Path("/sys/fs/cgroup/cpu") / top / "cpu.shares"
        if not cls.processes or not top:
            yield
            return
        before = file.read_text()
        file.write_text(str(1024 * CORES * cls.processes))
        try:
            time.sleep(0.5)
            yield
        finally:
            file.write_text(before)


def idle() -> float:
    fields = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return sum(int(f[4]) + int(f[5]) for f in fields if f[0][:3] == "cpu" and f[0] != "cpu") / os.sysconf("SC_CLK_TCK")


def sample(guests: list[Guest], seconds: float) -> Sampled:
    rows: list[list[tuple[float, float]]] = []
    with Ahead.of(guests), exact():
        began, idled = time.monotonic(), idle()
        for number in range(round(seconds / SAMPLE_S) + 1):
            time.sleep(max(0.0, began + number * SAMPLE_S - time.monotonic()))
            rows.append([guest.times() for guest in guests])
        all_s, idled = (time.monotonic() - began) * CORES, idle() - idled
    table = np.diff(np.array(rows), axis=0)
    used = float(table[:, :, 0].sum())
    return Sampled(table[:, :, 0], table[:, :, 1], idled / all_s, max(0.0, all_s - idled - used) / all_s)


class Asked(NamedTuple):
    """What the guests were promised: weights, and the cores each can use at most (its CPUs)."""

    weight: Floats
    most: Floats

    @classmethod
    def of(cls, guests: list[Guest], weights: list[float]) -> Asked:
        return cls(np.array(weights), np.array([float(guest.cpus) for guest in guests]))


def entitled(total: float, asked: Asked, wanted: Floats) -> Floats:
    """Entitlements out of ``total``; ``wanted``: cores each one wanted on average, at most its CPUs. What others took is
    borne by all: a core counts as what guests got of it."""
    most = np.minimum(wanted, asked.most)
    most = most * total / min(CORES, max(most.sum(), 1e-9))
    none = np.zeros(len(most))
    return np.asarray(fill(total, asked.weight, none, none + np.inf, most).entitlement)


def worst(run: Floats, asked: Asked, window_s: float) -> float:
    """max|x−1| over all guests and windows (each overlaps the next by half), for guests that always want all."""
    width, found = round(window_s / SAMPLE_S), 0.0
    for start in range(0, len(run) - width + 1, max(1, width // 2)):
        used = run[start : start + width].sum(axis=0)
        found = max(found, float(np.abs(used / entitled(used.sum(), asked, asked.most) - 1).max()))
    return found


def followed(sampled: Sampled, asked: Asked) -> Floats:
    """Entitlements in each sample, following what each guest's CPUs wanted."""
    want = (sampled.run + sampled.wait) / SAMPLE_S
    return np.array([entitled(r.sum(), asked, w) for r, w in zip(sampled.run, want, strict=True)])


def moving(sampled: Sampled, asked: Asked) -> float:
    """Mean over windows of 1 s of Σ|used − due| / Σ used, where what is due follows the demand."""
    due, width, found = followed(sampled, asked), round(1 / SAMPLE_S), []
    for start in range(0, len(due) - width + 1, width):
        used, owed = sampled.run[start : start + width].sum(axis=0), due[start : start + width].sum(axis=0)
        found.append(float(np.abs(used - owed).sum() / used.sum()))
    return statistics.fmean(found)


def jain(run: Floats, asked: Asked) -> float:
    used = run.sum(axis=0)
    x = used / entitled(used.sum(), asked, asked.most)
    return float(x.sum() ** 2 / (len(x) * (x * x).sum()))
