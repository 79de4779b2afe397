"""How exactly busy VMs get their shares: real guests under several regimes, one after the other in one run.

Method. Micro guests run a small busy program (guest/load.c). The arms are `nothing` (no control groups, the kernel's own
balance), `weights` (cgroup weights set once by hand, below one parent), `libvirt` (guests of its own, weights set once
with `virsh schedinfo`) and `corral` (the daemon and its governor). In the first two the daemon is down and the same
guests run on. Every 100 ms the run time of all threads of each QEMU is read (/proc/PID/task/TID/schedstat) by this
process at SCHED_FIFO, so that the windows are exact. Over windows of 1 s and 10 s, x = used / entitled, where the
entitlement is water-filling by weight of what the VMs got together, at most what a core had for each CPU of a guest.
Printed: the worst |x-1| of all VMs and windows and the median of the runs' worst; Jain's index of x, which hides errors;
CPU time that was idle meanwhile, and what other programs used. With changing demand the entitlement follows what each
VM's threads wanted in each sample (run and wait time). Reservations are judged by a counter in the guest too.

Each case takes one to four minutes; measure on a machine that does nothing else, and look at the column that says so.
Where that cannot be had, `--ahead 64` gives all guests together a weight that pushes other programs aside while samples
are taken, the same in every arm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shares import cases, picture
from shares.arms import ARMS
from shares.cases import Extent
from shares.measure import Ahead
from tests.integration.platform import Platform

SETS = ("1:1", "1:1:1", "1:1:2", "1:2:3:4", "1:100")
MOVING = ("1:1:1", "1:1:2")
CASES = ("constant", "changing", "caps", "reservation", "theft", "returning", "pairs", "foreign")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--only", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--sets", nargs="+", metavar="W:W…", help=f"weights; default {' '.join(SETS)}")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument(
        "--ahead", type=int, default=0, metavar="N", help="while measuring, guests weigh as N processes a core"
    )
    parser.add_argument("--samples", type=Path, metavar="FILE.npz", help="keep samples of changing demand")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw --samples; measure nothing")
    options = parser.parse_args()
    if options.picture:
        picture.draw(options.samples, options.picture)
        return
    Ahead.processes = options.ahead
    with Platform() as platform:
        platform.up()
        platform.run("image", "build", "micro", timeout=300)
        for case in options.only:
            measure(case, platform, options)


def measure(case: str, platform: Platform, options: argparse.Namespace) -> None:
    def extent(sets: tuple[str, ...], *, seconds: float = options.seconds, others: bool = True) -> Extent:
        chosen = [[float(word) for word in text.split(":")] for text in options.sets or sets]
        arms = [arm for arm in options.arms if others or arm != "libvirt"]
        return Extent(options.runs, seconds, chosen, arms)

    if case == "constant":
        cases.constant(platform, extent(SETS)).show()
    elif case == "changing":  # whole waves of 6 s
        seconds = max(6.0, options.seconds // 6 * 6)
        cases.changing(platform, extent(MOVING, seconds=seconds, others=False), options.samples).show()
    else:
        getattr(cases, case)(platform, extent(SETS, others=False)).show()


if __name__ == "__main__":
    main()
