"""Finds out which control groups can really be used here: what is mounted, and what may be written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from corral.errors import CorralError
from corral.host.cgroup import systemd
from corral.host.cgroup.none import NoGroups
from corral.host.cgroup.protocol import Groups
from corral.host.cgroup.v1 import GroupsV1
from corral.host.cgroup.v2 import CONTROLLERS, PARENT, GroupsV2

NEEDED = ("cpu", "cpuacct")
USED = (*NEEDED, "memory")


def choose(state: Path, mounts: Path = Path("/proc/self/mounts"), init: Path = systemd.RUNNING) -> Groups:
    """The groups of the VMs of a state directory. Never raises: what cannot be used is said by ``describe``."""
    name = f"corral-{hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:8]}"
    if os.geteuid() != 0:
        return NoGroups("they need root; weights become nice values, limits (caps) cannot be enforced")
    rows = [line.split() for line in mounts.read_text().splitlines()]
    ones = {c: Path(where) for _, where, kind, options, *_ in rows if kind == "cgroup" for c in options.split(",")}
    cpus = len(os.sched_getaffinity(0))
    if all(controller in ones for controller in NEEDED):
        return _tried(GroupsV1({c: ones[c] for c in USED if c in ones}, name, cpus))
    for _, where, kind, *_ in rows:
        root = Path(where)
        if kind == "cgroup2" and "cpu" in (controllers := (root / "cgroup.controllers").read_text().split()):
            if init.exists():
                return _within_systemd(root, name, cpus)
            return _tried(GroupsV2(root, name, cpus, frozenset(controllers)))
    return NoGroups("no hierarchy with the cpu controller is mounted; limits (caps) cannot be enforced")


def _within_systemd(root: Path, name: str, cpus: int) -> Groups:
    try:
        ours = systemd.delegated(root, name, min(10_000, PARENT * cpus))
        there = frozenset((ours / "cgroup.controllers").read_text().split())
    except CorralError as error:
        return NoGroups(f"{error.message}; weights become nice values, limits cannot be enforced")
    if "cpu" not in there:
        return NoGroups(f"systemd gives {ours} no cpu controller; limits (caps) cannot be enforced")
    return _tried(GroupsV2(ours, "vms", cpus, there & frozenset(CONTROLLERS)))


def _tried(groups: Groups) -> Groups:
    """Only what can be written counts: in many containers the hierarchy is mounted read-only."""
    try:
        groups.prepare("probe")
        groups.weight("probe", 1.0)
        groups.remove("probe")
    except CorralError as error:
        return NoGroups(f"{error.message}; limits (caps) cannot be enforced")
    return groups
