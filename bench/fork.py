"""Starting a guest as the platform's users do, by forking a booted one: beside booting it, beside QEMU by hand and libvirt.

Method. One image, one amount of memory. The arms, in turn in each round, so that whatever else the machine does hits all
alike: QEMU by hand with the command line that Corral boots the VM with; `virsh start` of a libvirtd of its own, same
kernel, disk and agent; `virsh restore` of such a guest, booted and saved; Corral booting (`--cold`), forking (without a
warm pool), and handing out a fork that waited; and `corral run --rm IMAGE -- true` as a process. Two marks: the guest's
agent answers, and the guest is somebody of its own (clock, entropy, host name, machine-id, host key, MAC, address; one
that booted makes some of that itself), for the peers told by a small client with the same message. Times begin just before the request; Corral's are the daemon's own
marks. CPU seconds are of all processes together until then (QEMU, daemon, governor, libvirtd, virsh; of a fork that waited
also what it took to make it). "Own" memory is `Anonymous` of QEMU's smaps_rollup. `× boot`: Corral's cold boot to its
agent's answer, by this. Arms that do not boot are started three times in each round.

In place of that: `--rate N`: `corral launch --count N`. `--sizes`: templates of several amounts of memory, forked in turn.
`--live N`: so many at once, each asked for its name. `--pauses`: `corral vm fork` of a VM that writes memory at several
rates: how long it stands still against how much is copied meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = ("128M", "512M", "2G")
RATES = (0, 100, 400, 1000, 2000, 4000)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    from forks.arms import BOOT, rounds
    from forks.measure import shown, summary, table
    from peers.started import Started

    found = rounds(options.image, options.memory, options.runs)
    rows = summary(found, BOOT)
    table(shown(rows))
    return {
        "arms": rows,
        "starts": {arm: [dict(zip(Started._fields, one, strict=True)) for one in ones] for arm, ones in found.items()},
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for; printed, and as figures."""
    from forks import pauses, scale

    if options.rate:
        return scale.rate(options.image, options.memory, options.rate)
    if options.live:
        return scale.live(options.image, options.memory, options.live)
    if options.sizes:
        return scale.sizes(options.image, options.sizes, options.runs * 3)
    if options.pauses:
        return pauses.measure(options.image, options.memory, options.pauses, options.runs)
    return compare(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="debian", choices=("debian", "micro"))
    parser.add_argument("--memory", default="512M", metavar="SIZE", help="of each guest (default 512M)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what --json has; measure nothing")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--rate", type=int, metavar="N", help="forks a second, over N launched at once")
    one.add_argument("--live", type=int, metavar="N", help="N forks alive at once")
    one.add_argument("--sizes", nargs="*", metavar="SIZE", help=f"templates of these sizes (default {' '.join(SIZES)})")
    one.add_argument("--pauses", nargs="*", type=int, metavar="MIB_S", help=f"MiB/s written (default {RATES})")
    options = parser.parse_args()
    options.sizes = SIZES if options.sizes == [] else options.sizes
    options.pauses = RATES if options.pauses == [] else options.pauses
    if options.picture:
        from forks.picture import draw

        draw(json.loads(options.json.read_text()), options.picture)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    began, load = time.monotonic(), os.getloadavg()[0]
    print(f"{options.image}, {options.memory}, {os.cpu_count()} cores", flush=True)
    figures = measured(options)
    after = os.getloadavg()[0]
    print(f"load average {load:.1f} before, {after:.1f} after; {time.monotonic() - began:.0f} s in all")
    if options.json:
        about = {"image": options.image, "memory": options.memory, "cores": os.cpu_count(), "load": [load, after]}
        options.json.write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
