"""What the governor itself costs: many busy processes that stand for VMs, each in a control group of its own.

The real governor process and the real control groups, without guests: 50 guests would need memory, and what they do is
nothing to the governor, which only reads counters and moves threads. Printed: the governor's CPU time in parts of a core
(measured from outside, /proc/PID/stat), its mode, and how exact the shares were meanwhile (weights 1, 2 and 3 in turns).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shares.measure import CORES, Asked, Guest, sample, worst

from corral.governor.protocol import Plan, Report, VmPlan
from corral.host.cgroup import choose


def busy(count: int, part: float) -> list[subprocess.Popen[bytes]]:
    """Processes of one thread each, that run all the time or ``part`` of it."""
    loop = "while True: pass" if part >= 1 else (
        f"import time\nwhile True:\n t=time.monotonic()+{part / 10}\n while time.monotonic()<t: pass\n time.sleep({(1 - part) / 10})"
    )  # fmt: skip
    return [subprocess.Popen([sys.executable, "-S", "-c", loop]) for _ in range(count)]


def cost_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=50)
    parser.add_argument("--part", type=float, default=1.0, help="of the time in which each one wants to run")
    parser.add_argument("--weights", help="W:W…; default 1:2:3 repeated")
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    state = Path(tempfile.mkdtemp(prefix="corral-bench-"))
    groups = choose(state)
    weights = (
        [float(w) for w in options.weights.split(":")] if options.weights else [1.0 + n % 3 for n in range(options.vms)]
    )
    processes = busy(len(weights), options.part)
    ids = [f"vm-{number}" for number in range(len(weights))]
    governor = subprocess.Popen(
        [sys.executable, "-m", "corral.governor", "--state", str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert governor.stdin is not None
    assert governor.stdout is not None
    try:
        for id, process in zip(ids, processes, strict=True):
            for file in groups.prepare(id):
                file.write_text(str(process.pid))
        plan = Plan(
            vms=tuple(
                VmPlan(id=id, project="p", pid=process.pid, threads=(process.pid,), weight=100 * weight)
                for id, process, weight in zip(ids, processes, weights, strict=True)
            )
        )
        governor.stdin.write(msgspec.json.encode(plan) + b"\n")
        governor.stdin.flush()
        time.sleep(4)
        guests = [Guest(id, process.pid) for id, process in zip(ids, processes, strict=True)]
        began, before = time.monotonic(), cost_s(governor.pid)
        sampled = sample(guests, options.seconds)
        cost = (cost_s(governor.pid) - before) / (time.monotonic() - began)
        report = msgspec.json.decode(governor.stdout.readline(), type=Report)
        asked = Asked.of(guests, weights)
        print(f"{len(guests)} processes on {CORES} cores, {options.seconds:g} s; {report.mode}")
        print(
            f"governor: {100 * cost:.2f} % of a core, steering: {report.steering}; other programs {100 * sampled.other:.1f} %"
        )
        if options.part >= 1:
            print(
                f"worst |x-1|: {100 * worst(sampled.run, asked, 1.0):.2f} % over 1 s, {100 * worst(sampled.run, asked, 10.0):.2f} % over 10 s"
            )
    finally:
        for process in (*processes, governor):
            process.kill()
            process.wait()
        for id in ids:
            for file in groups.prepare(id):
                file.parent.rmdir()
        for parent in {file.parent.parent for file in groups.prepare(ids[0])}:
            (parent / ids[0]).rmdir()
            parent.rmdir()


if __name__ == "__main__":
    main()
