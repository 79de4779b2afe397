"""The ways to start a guest that are compared. Each is called again and again, and leaves nothing running."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from peers import libvirtd
from peers.guests import Peers
from peers.started import Started

from forks.platforms import Forks, forks

BOOT = "Corral, cold"
"""The arm that others are compared with: a boot of the same VM."""
QUICK = 3
"""Starts in each round of an arm that does not boot."""
Arms = dict[str, Callable[[], Started]]


@contextmanager
def arms(image: str, memory: str) -> Iterator[tuple[Arms, Arms]]:
    """Those that boot, and those that do not. Templates are made and caches warmed before the first one is called."""
    with ExitStack() as stack:
        plain = stack.enter_context(forks(image, warm=False))
        pool = stack.enter_context(forks(image, warm=True))
        slow: Arms = {}
        quick: Arms = {}
        peers = _peers(stack, plain, memory)
        slow["raw QEMU, cold"] = peers.by_hand
        if why := libvirtd.missing():
            print(f"libvirt is not compared with: {why}", file=sys.stderr)
        else:
            daemon = stack.enter_context(libvirtd.running())
            slow["virsh start, cold"] = lambda: peers.virsh_start(daemon)
            saved = peers.virsh_save(daemon)
            quick["virsh restore"] = lambda: peers.virsh_restore(daemon, saved)
        slow[BOOT] = lambda: _launched(plain, memory, cold=True)
        for one in (plain, pool):
            one.template(memory)
            one.template(memory, network=False)
        for one in (plain, pool):
            one.ready()
        quick["Corral, fork"] = lambda: _launched(plain, memory)
        quick["Corral, warm pool"] = lambda: _launched(pool, memory)
        quick["corral run, fork"] = lambda: _ran(plain, memory)
        quick["corral run, warm pool"] = lambda: _ran(pool, memory)
        pool.platform.run("launch", image, "--name", "first", "--memory", memory)  # only of what is used one waits
        pool.platform.run("delete", "first", "--force")
        pool.platform.run("run", "--memory", memory, image, "--", "true")
        for arm in quick.values():
            arm()
        yield slow, quick


def rounds(image: str, memory: str, runs: int) -> dict[str, list[Started]]:
    """All arms in turn, ``runs`` times."""
    found: dict[str, list[Started]] = {}
    with arms(image, memory) as (slow, quick):
        for number in range(runs):
            for group, times in ((slow, 1), (quick, QUICK)):
                for _ in range(times):
                    for name, arm in group.items():
                        found.setdefault(name, []).append(arm())
            print(f"round {number + 1} of {runs}", file=sys.stderr, flush=True)
    return found


def _peers(stack: ExitStack, plain: Forks, memory: str) -> Peers:
    """Started like a VM that Corral boots."""
    plain.settle()
    vm, _ = plain.start(memory, name="pattern", cold=True)
    peers = stack.enter_context(Peers.like(vm.status["pid"]))
    vm.delete(force=True)
    return peers


def _launched(one: Forks, memory: str, *, cold: bool = False) -> Started:
    one.settle()
    vm, started = one.start(memory, name="one", cold=cold)
    vm.delete(force=True)
    return started


def _ran(one: Forks, memory: str) -> Started:
    """``corral run IMAGE -- true``, as a process."""
    one.settle()
    began = time.monotonic()
    one.platform.run("run", "--rm", "--memory", memory, one.image, "--", "true")
    return Started(whole=time.monotonic() - began)
