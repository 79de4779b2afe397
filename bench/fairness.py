"""How exactly busy VMs get their shares: real guests, the same ones under three arms, one after the other in one run.

Method. Micro guests run busy loops. For each set of weights the arms are: `nothing` (no control groups, the kernel's own
balance), `weights` (cgroup weights set once by hand, below one parent) and `corral` (the daemon and its
governor; in the other arms the daemon is down, VMs run on). Every 100 ms the run time of all threads of each QEMU is
read (/proc/PID/task/TID/schedstat) by this process at SCHED_FIFO, so that the windows are exact. Over windows of 1 s and
10 s, x = used / entitled, where the entitlement is water-filling of what the VMs got together by their weights, at most
what one CPU had for each vCPU. Printed: the worst |x−1| of all VMs and windows, the median of the runs' worst, Jain's
index of used/weight, idle CPU time while all are hungry. With changing demand the entitlement follows what each VM
wanted in each sample (its run and wait time). Caps: use over 10 s against the cap.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.integration.platform import Platform

from corral.host.cgroup import choose
from corral.scheduler.shares.fill import fill

SAMPLE_S = 0.1
SETS = ("1:1", "1:1:1", "1:1:2", "1:2:3:4", "1:100")
ARMS = ("nothing", "weights", "corral")
BUSY = "while :; do :; done"
CORES = len(os.sched_getaffinity(0))


class Vm:
    """A running guest: its name, QEMU and threads."""

    def __init__(self, platform: Platform, name: str) -> None:
        record = platform.vm(name)
        self.name, self.id, self.pid = name, record["meta"]["id"], record["status"]["pid"]

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


def idle() -> float:
    fields = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return sum(int(f[4]) + int(f[5]) for f in fields if f[0][:3] == "cpu" and f[0] != "cpu") / os.sysconf("SC_CLK_TCK")


def sample(vms: list[Vm], seconds: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """Run and wait times of each VM in each sample (samples × VMs), and the part of all CPU time that was idle."""
    rows, began, idled = [], time.monotonic(), idle()
    with exact():
        for number in range(round(seconds / SAMPLE_S) + 1):
            time.sleep(max(0.0, began + number * SAMPLE_S - time.monotonic()))
            rows.append([vm.times() for vm in vms])
    table = np.diff(np.array(rows), axis=0)
    return table[:, :, 0], table[:, :, 1], (idle() - idled) / (time.monotonic() - began) / CORES


def errors(run: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], window_s: float) -> float:
    """The worst |x−1| of VMs whose demand is constant."""
    width = round(window_s / SAMPLE_S)
    worst = 0.0
    for start in range(0, len(run) - width + 1, max(1, width // 2)):
        used = run[start : start + width].sum(axis=0)
        worst = max(worst, float(np.abs(used / entitled(used.sum(), weights, np.ones(len(weights))) - 1).max()))
    return worst


def entitled(total: float, weights: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Entitlements out of ``total`` CPU seconds; ``wanted``: part of the time in which each one's CPU wanted to run."""
    most = wanted * total / min(CORES, max(wanted.sum(), 1e-9))
    return np.asarray(fill(total, weights, np.zeros(len(weights)), np.full(len(weights), np.inf), most).entitlement)


def moving_error(run: np.ndarray[Any, Any], wait: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    """Mean over windows of 1 s of Σ|used − entitled| / Σ used, with entitlements that follow the demand."""
    due = np.array(
        [entitled(r.sum(), weights, np.minimum(1.0, (r + w) / SAMPLE_S)) for r, w in zip(run, wait, strict=True)]
    )  # fmt: skip
    width = round(1 / SAMPLE_S)
    found = []
    for start in range(0, len(run) - width + 1, width):
        used, owed = run[start : start + width].sum(axis=0), due[start : start + width].sum(axis=0)
        found.append(float(np.abs(used - owed).sum() / used.sum()))
    return statistics.fmean(found)


def jain(run: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    used = run.sum(axis=0)
    x = used / entitled(used.sum(), weights, np.ones(len(weights)))
    return float(x.sum() ** 2 / (len(x) * (x * x).sum()))


class Arms:
    """Puts the same VMs under one regime after the other."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._groups = choose(platform.state)
        self._up = True

    def enter(self, arm: str, vms: list[Vm], weights: list[float]) -> None:
        if (arm == "corral") != self._up:
            self._platform.run("up" if arm == "corral" else "down")
            self._up = arm == "corral"
        for vm, weight in zip(vms, weights, strict=True):
            if arm == "corral":
                self._platform.run("vm", "set", vm.id, f"cpu.weight={round(weight * 100)}", "cpu.limit=none")
            else:
                vm.affinity(set(os.sched_getaffinity(0)))
                cores = weight / sum(weights) * CORES if arm == "weights" else 1.0
                for file in self._groups.prepare(vm.id):
                    place = file if arm == "weights" else file.parents[2] / "cgroup.procs"
                    place.write_text(str(vm.pid))
                self._groups.weight(vm.id, cores)
        if arm == "corral":
            for vm in vms:
                for file in self._groups.prepare(vm.id):
                    file.write_text(str(vm.pid))
        time.sleep(3)


def busy(platform: Platform, name: str, program: str = BUSY) -> None:
    """Have a guest busy for good: it goes on when the daemon is down."""
    platform.run("exec", name, "--", "sh", "-c", f"setsid sh -c '{program}' >/dev/null 2>&1 </dev/null &")


def calm(platform: Platform, name: str) -> None:
    platform.run("exec", name, "--", "sh", "-c", "pkill -f 'sh -c while' || killall sh; true", check=False)


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    sys.stdout.flush()


def launch(platform: Platform, count: int) -> list[Vm]:
    platform.run("launch", "micro", "--count", str(count), "--name", "v", "--memory", "96M", timeout=300)
    return [Vm(platform, f"v-{n + 1}") for n in range(count)]


def constant(platform: Platform, runs: int, seconds: float, sets: tuple[str, ...], arms_: tuple[str, ...]) -> None:
    rows = []
    for text in sets:
        weights = [float(word) for word in text.split(":")]
        with fleet(platform, len(weights), lambda _n: BUSY) as (vms, arms):
            for arm in arms_:
                arms.enter(arm, vms, weights)
                ones, tens, fair, idles = [], [], [], []
                for _ in range(runs):
                    run, _, idled = sample(vms, seconds)
                    w = np.array(weights)
                    ones.append(errors(run, w, 1.0))
                    tens.append(errors(run, w, min(10.0, seconds)))
                    fair.append(jain(run, w))
                    idles.append(idled)
                rows.append(
                    [
                        text,
                        arm,
                        *(f"{100 * f(v):.2f} %" for v in (ones, tens) for f in (max, statistics.median)),
                        f"{min(fair):.5f}",
                        f"{100 * max(idles):.2f} %",
                    ]
                )
                print("  " + "  ".join(rows[-1]), flush=True)
            arms.enter("corral", vms, weights)
    table(
        f"Constant demand, {CORES} cores, {runs} runs of {seconds:g} s: worst |x-1| of all VMs and windows",
        ["weights", "arm", "1 s worst", "1 s median", "10 s worst", "10 s median", "Jain", "idle"], rows,
    )  # fmt: skip


def changing(platform: Platform, runs: int, seconds: float) -> None:
    """Two VMs are always hungry, the third for 3 s of every 6."""
    rows = []
    wave = "while :; do e=$(($(date +%s)+3)); while [ $(date +%s) -lt $e ]; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; done; sleep 3; done"
    for text in ("1:1:1", "1:1:2"):
        weights = [float(word) for word in text.split(":")]
        with fleet(platform, 3, lambda n: wave if n == 2 else BUSY) as (vms, arms):
            for arm in ARMS:
                arms.enter(arm, vms, weights)
                found = []
                for _ in range(runs):
                    run, wait, _ = sample(vms, seconds)
                    found.append(moving_error(run, wait, np.array(weights)))
                rows.append([text, arm, f"{100 * statistics.median(found):.2f} %", f"{100 * max(found):.2f} %"])
            arms.enter("corral", vms, weights)
    table(
        f"Changing demand (one VM hungry 3 s of every 6), {runs} runs of {seconds:g} s: Σ|used-due|/Σused over 1 s",
        ["weights", "arm", "median", "worst"], rows,
    )  # fmt: skip


def caps(platform: Platform, runs: int, seconds: float) -> None:
    rows = []
    with fleet(platform, 1, lambda _n: BUSY) as (vms, _):
        for percent in (10, 25, 50, 75, 90):
            platform.run("vm", "set", vms[0].id, f"cpu.limit={percent}%")
            time.sleep(2.5)
            found = [float(sample(vms, seconds)[0].sum()) / seconds for _ in range(runs)]
            off = [value / (percent / 100) - 1 for value in found]
            rows.append(
                [f"{percent} %", f"{100 * statistics.median(found):.2f} %", f"{100 * max(off, key=abs):+.2f} %"]
            )
    table(f"Caps, {runs} runs of {seconds:g} s", ["cap", "used, median", "worst error"], rows)


def reservation(platform: Platform, runs: int, seconds: float) -> None:
    """A VM with half a core reserved and the least weight, beside three neighbours that want everything."""
    rows = []
    with fleet(platform, 4, lambda _n: BUSY) as (vms, arms):
        arms.enter("corral", vms, [1.0, 100.0, 100.0, 100.0])
        platform.run("vm", "set", vms[0].id, "cpu.weight=1", "cpu.reserve=50%")
        time.sleep(3)
        found = [float(sample(vms, seconds)[0][:, 0].sum()) / seconds for _ in range(runs)]
        spread = (max(found) - min(found)) / statistics.fmean(found)
        rows.append(["50 %", f"{100 * statistics.median(found):.2f} %", f"{100 * spread:.2f} %"])
    table(f"Reservation beside noisy neighbours, {runs} windows of {seconds:g} s", ["reserved", "used", "spread"], rows)


@contextmanager
def fleet(
    platform: Platform, count: int, program: Callable[[int], str]
) -> Iterator[tuple[list[Vm], Arms]]:  # fmt: skip
    """So many busy VMs, gone afterwards."""
    vms = launch(platform, count)
    for number, vm in enumerate(vms):
        busy(platform, vm.name, program(number))
    yield vms, Arms(platform)
    platform.run("up", check=False)
    platform.run("delete", "--force", *(vm.name for vm in vms), timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", choices=["constant", "changing", "caps", "reservation"], action="append")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    options = parser.parse_args()
    only = options.only or ["constant", "changing", "caps", "reservation"]
    with Platform() as platform:
        platform.up()
        platform.run("image", "build", "micro", timeout=300)
        if "constant" in only:
            constant(platform, options.runs, options.seconds, tuple(options.sets), tuple(options.arms))
        if "changing" in only:
            changing(platform, options.runs, max(24.0, options.seconds))
        if "caps" in only:
            caps(platform, options.runs, options.seconds)
        if "reservation" in only:
            reservation(platform, options.runs, options.seconds)


if __name__ == "__main__":
    main()
