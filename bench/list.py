"""`corral list` as a whole process on 20 VMs, and what an idle daemon with 20 VMs costs.

Method. 20 real micro guests (96 MiB) run. `corral list` is started as a process --runs times, its wall time taken from outside; `python -c pass` alternates with it as
the floor. Then the daemon's CPU time is read over --idle seconds with nobody asking, and its memory (RSS, PSS, anonymous) at the end.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.integration.platform import CORRAL, Platform


def wall(command: list[str], env: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def cpu_seconds(pid: int) -> float:
    return sum(int((t / "schedstat").read_text().split()[0]) for t in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of idling to watch")
    parser.add_argument("--vms", type=int, default=20)
    options = parser.parse_args()
    with Platform() as platform:
        pid = platform.up()
        platform.run("image", "build", "micro", timeout=300)
        platform.run(
            "launch",
            "micro",
            "--name",
            "vm",
            "--count",
            str(options.vms),
            "--memory",
            "96M",
            "--timeout",
            "300s",
            timeout=320,
        )
        time.sleep(15)
        arms = {"corral list": [str(CORRAL), "list"], "python -c pass": [sys.executable, "-c", "pass"]}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.runs):
            for name, command in arms.items():
                times[name].append(wall(command, platform.env))
        for name, values in times.items():
            print(
                f"{name:16} median {statistics.median(values) * 1000:6.1f} ms   min {min(values) * 1000:6.1f}   max {max(values) * 1000:6.1f}   ({len(values)} runs, {options.vms} VMs)"
            )
        before, started = cpu_seconds(pid), time.perf_counter()
        time.sleep(options.idle)
        used = (cpu_seconds(pid) - before) / (time.perf_counter() - started)
        memory = {
            k: int(v.split()[0]) / 1024
            for k, v in (line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        }
        print(
            f"idle daemon      {used * 100:.2f} % of a core over {options.idle:g} s; RSS {memory['Rss']:.0f} MiB, PSS {memory['Pss']:.0f}, anonymous {memory['Anonymous']:.0f}   ({options.vms} VMs)"
        )


main()
