"""The regimes that the same guests are put under, one after the other."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.integration.platform import Platform

from corral.host.cgroup import choose
from shares.measure import CORES, Guest

ARMS = ("nothing", "weights", "libvirt", "corral")
"""``libvirt`` starts guests of its own: see :mod:`shares.libvirt`."""
SETTLE_S = 3.0


class Arms:
    """``nothing``: no groups among guests, the kernel's own balance. ``weights``: cgroup weights set once by hand, below one parent.
    In both the daemon is down; guests run on. ``corral``: the daemon and its governor."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._groups = choose(platform.state)
        self._up = True

    def enter(self, arm: str, guests: list[Guest], weights: list[float]) -> None:
        if (arm == "corral") != self._up:
            self._platform.run("up" if arm == "corral" else "down")
            self._up = arm == "corral"
        for guest, weight in zip(guests, weights, strict=True):
            if arm == "corral":
                self._platform.run("vm", "set", guest.id, f"cpu.weight={round(weight * 100)}")
            else:
                guest.affinity(set(os.sched_getaffinity(0)))
            self._place(guest, arm != "nothing")
            if arm == "weights":
                self._groups.weight(guest.id, weight / sum(weights) * CORES)
        time.sleep(SETTLE_S)

    def _place(self, guest: Guest, inside: bool) -> None:
        for file in self._groups.prepare(guest.id):
            place: Path = file if inside else file.parents[1] / "cgroup.procs"  # all in one, as if there were none
            place.write_text(str(guest.pid))
