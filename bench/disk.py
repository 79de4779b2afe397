"""Limits of disks as the guest sees them, and what the filter that limits costs when nothing is limited.

Method. A `micro` guest under the QEMU engine with a raw disk of 1 GiB, empty or in the host's page cache. Precision: for each setting, changed live, `dd` with O_DIRECT in the
guest makes requests one after the other (or from four processes at once) for about --seconds, timed by the guest's clock, after a warm-up that uses up what may be saved up;
the median of --runs, and the one that is furthest off. Cost: two guests, one without the throttle filter (the very same command line, its block node taken out), the other
with it and no limits; runs alternate, medians and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.integration.test_disk_limits import Limited, machine

from corral.engine.protocol import Limits, Machine
from corral.engine.qemu import engine
from corral.engine.qemu.command import Surroundings, build
from corral.units import GIB, KIB, MIB, format_size


class Setting(NamedTuple):
    """One row: limits, and the requests a second that they come to with this block size."""

    limits: Limits
    wanted: float
    block: int
    write: bool = False
    at_once: int = 1

    def __str__(self) -> str:
        limits, what = self.limits, "written" if self.write else "read"
        parts = [f"{limits.iops} iops"] if limits.iops else []
        parts += [f"{format_size(limits.bandwidth)}/s"] if limits.bandwidth else []
        depth = f", {self.at_once} at once" if self.at_once > 1 else ""
        return f"{' and '.join(parts)}, {what} in {format_size(self.block)}{depth}"


def iops(count: int, **more: int) -> Setting:
    return Setting(Limits(iops=count), count, 4 * KIB, **more)  # type: ignore[arg-type]


def bandwidth(rate: int, block: int, **more: int) -> Setting:
    return Setting(Limits(bandwidth=rate), rate / block, block, **more)  # type: ignore[arg-type]


SETTINGS = [
    iops(50), iops(200), iops(200, write=True), iops(500), iops(1000), iops(1000, write=True), iops(500, at_once=4),
    bandwidth(MIB, 64 * KIB), bandwidth(4 * MIB, 64 * KIB), bandwidth(10 * MIB, 256 * KIB),
    bandwidth(10 * MIB, MIB, write=True), bandwidth(40 * MIB, MIB), bandwidth(10 * MIB, 64 * KIB, at_once=4),
    Setting(Limits(iops=1000, bandwidth=4 * MIB), 64, 64 * KIB), Setting(Limits(iops=50, bandwidth=40 * MIB), 50, 64 * KIB),
]  # fmt: skip


async def precision(runs: int, seconds: float, only: str) -> None:
    print(
        f"{'limit':46} {'wanted':>8} {'median':>8} {'off by':>8} {'worst':>8}   requests a second, {seconds:g} s each"
    )
    async with machine(Limits(), GIB) as vm:
        for setting in (s for s in SETTINGS if only in str(s)):
            await vm.limit(setting.limits)
            count = max(8, round(setting.wanted * seconds / setting.at_once))
            await vm.seconds(max(2, round(setting.wanted / 4)), setting.block, write=setting.write)
            seen = []
            for _ in range(runs):
                took = await vm.seconds(count, setting.block, write=setting.write, at_once=setting.at_once)
                seen.append(count * setting.at_once / took)
            off = [100 * (one / setting.wanted - 1) for one in seen]
            middle = statistics.median(seen)
            print(
                f"{setting!s:46} {setting.wanted:8.1f} {middle:8.1f} {100 * (middle / setting.wanted - 1):+7.2f}% "
                f"{max(off, key=abs):+7.2f}%",
                flush=True,
            )


def unfiltered(wanted: Machine, around: Surroundings) -> list[str]:
    """The command line of an engine that knows no limits: each device on the format's own node."""
    argv = []
    for word in build(wanted, around):
        tree = json.loads(word) if word.startswith("{") else {}
        if tree.get("driver") == "throttle":
            word = json.dumps({**tree["file"], "node-name": tree["node-name"]})
        argv.append(word)
    assert not any('"driver":"throttle"' in word for word in argv)
    return argv


async def cost(runs: int) -> None:
    work = {"reads of 4 KiB a second": (8000, 4 * KIB, False), "writes of 4 KiB a second": (8000, 4 * KIB, True),
            "MiB/s read in 1 MiB": (800, MIB, False)}  # fmt: skip
    seen: dict[tuple[str, str], list[float]] = {}
    async with AsyncExitStack() as guests:
        with patch.object(engine, "build", unfiltered):
            raw = await guests.enter_async_context(machine(Limits(), GIB))
        filtered = await guests.enter_async_context(machine(Limits(), GIB))
        arms: list[tuple[str, Limited]] = [("raw", raw), ("filter", filtered)]
        for number in range(runs + 1):  # the first round warms up
            for what, (count, block, write) in work.items():
                for name, vm in arms if number % 2 else arms[::-1]:
                    rate = await vm.rate(count, block, write=write)
                    if number:
                        seen.setdefault((what, name), []).append(rate)
    print(f"\n{'no limits':46} {'without':>8} {'with':>8}   ratio (median of {runs})")
    for what in work:
        without, through = (statistics.median(seen[what, name]) for name in ("raw", "filter"))
        print(f"{what:46} {without:8.0f} {through:8.0f}   {through / without:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--only", default="", help="settings whose line holds this text; 'cost' for the cost alone")
    options = parser.parse_args()
    if options.only != "cost":
        asyncio.run(precision(options.runs, options.seconds, options.only))
    if options.only in ("", "cost"):
        asyncio.run(cost(max(5, options.runs)))


if __name__ == "__main__":
    main()
