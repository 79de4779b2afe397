"""How long from the request to the guest agent's answer: Corral against raw QEMU with the very same command line.

Method. One daemon, image `micro`. The command line of a VM that Corral started is read from /proc/PID/cmdline; the raw arm starts exactly
that (own sockets, no daemon, no launcher) and waits for the agent's answer on its socket. Arms alternate; each arm's time runs from just
before the request (`corral launch` as a whole process; `corral` through the Python client; Popen for raw) to the answer. CPU seconds are those of the QEMU process
at that moment plus, for Corral, of the daemon and the command. With --libvirt a further arm starts a domain with the same kernel by `virsh start`, in a libvirtd of its own.
Prints medians and the ratio to raw. Forks, and what happens after the answer: bench/fork.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import libvirtd
from peers.guests import Peers
from peers.started import Started, children_cpu, cpu_of
from tests.integration.platform import CORRAL, Platform

import corral.sync


def command(platform: Platform, daemon: int, name: str) -> Started:
    cpu, own, started = cpu_of([daemon]), children_cpu(), time.monotonic()
    platform.run("launch", "micro", "--name", name, "--memory", "256M")
    took = time.monotonic() - started
    used = cpu_of([platform.vm(name)["status"]["pid"], daemon]) - cpu + children_cpu() - own
    platform.run("delete", name, "--force")
    return Started(answer=took, cpu=used)


def client(platform: Platform, daemon: int, name: str) -> Started:
    """The same through the Python client: without the start of a Python process."""
    with corral.sync.connect(state=platform.state) as connection:
        cpu, started = cpu_of([daemon]), time.monotonic()
        vm = connection.vms.launch("micro", name=name, memory="256M")
        took = time.monotonic() - started
        used = cpu_of([vm["status"]["pid"], daemon]) - cpu
        connection.vms.delete(name, force=True)
    return Started(answer=took, cpu=used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs of each arm (default 10)")
    parser.add_argument("--libvirt", action="store_true", help="a further arm: virsh start")
    options = parser.parse_args()
    if options.libvirt and (why := libvirtd.missing()):
        parser.error(why)
    results: dict[str, list[Started]] = {}
    with ExitStack() as stack:
        platform = stack.enter_context(Platform())
        daemon = platform.up()
        platform.run("image", "build", "micro", timeout=300)
        platform.run("launch", "micro", "--name", "pattern", "--memory", "256M")
        peers = stack.enter_context(Peers.like(platform.vm("pattern")["status"]["pid"]))
        virsh = stack.enter_context(libvirtd.running()) if options.libvirt else None
        for number in range(options.runs + 1):
            arms = {
                "raw QEMU": peers.by_hand,
                "corral launch": lambda n=number: command(platform, daemon, f"cli-{n}"),
                "corral client": lambda n=number: client(platform, daemon, f"api-{n}"),
            }
            if virsh is not None:
                arms["virsh start"] = lambda: peers.virsh_start(virsh)
            for name, arm in arms.items():
                figures = arm()
                if number:  # the first round warms caches
                    results.setdefault(name, []).append(figures)
            print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    base = statistics.median(one.answer or 0 for one in results["raw QEMU"])
    print(
        f"{'arm':15} {'median s':>9} {'min':>7} {'max':>7} {'CPU s':>7} {'ratio':>7}   ({options.runs} alternating runs, {CORRAL.name}, micro 256M)"
    )
    for name, figures in results.items():
        times = [one.answer or 0 for one in figures]
        middle, cpu = statistics.median(times), statistics.median(one.cpu or 0 for one in figures)
        print(f"{name:15} {middle:9.3f} {min(times):7.3f} {max(times):7.3f} {cpu:7.2f} {middle / base:7.2f}")


main()
