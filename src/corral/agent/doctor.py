"""Checks of this host: what works, what does not, and what to do about it, in words that need no manual."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from corral.agent.enforcement import Enforced
from corral.agent.ports import Facts
from corral.engine.protocol import Capabilities
from corral.scheduler.place import amount
from corral.units import GIB, MIB

Check = dict[str, Any]
Which = Callable[[str], str | None]


def check(name: str, ok: bool | str, message: str, hint: str = "") -> Check:
    """One line. ``ok``: true, false, or ``"warn"``."""
    return {"name": name, "ok": ok, "message": message, "hint": hint}


def examine(
    facts: Facts, capabilities: Capabilities | None, state: Path, *, problem: str = "",
    enforced: Sequence[Enforced] = (), which: Which = shutil.which, root: Path = Path("/"),
) -> list[Check]:  # fmt: skip
    """All checks. ``problem``: why there are no capabilities. ``enforced``: how what VMs are given holds here.
    ``root``: where /dev and /sys are looked for (tests)."""
    checks = [_engine(capabilities, problem)]
    checks += list(_accelerators(capabilities, root))
    checks += [_privileges(facts, capabilities), _memory(facts), _disk(facts, state), _network(root), _cgroups(root)]
    checks += [check(f"{one.resource} limits", True if one.whole else "warn", one.how) for one in enforced]
    checks += list(_programs(which))
    return checks


def _engine(able: Capabilities | None, problem: str) -> Check:
    if able is None:
        hint = "apt install qemu-system-x86 qemu-utils"
        return check("qemu", False, problem or "QEMU was not found", hint)
    return check("qemu", True, f"{able.engine}, for {able.arch} guests; firmware: {', '.join(able.firmware) or 'none'}")


def _accelerators(able: Capabilities | None, root: Path) -> Iterator[Check]:
    device = root / "dev/kvm"
    if able is None:
        return
    for probe in able.probes:
        if probe.name == "kvm" and not probe.works:
            hint = (
                "" if device.exists() else "load the kvm module, or turn on virtualization in the firmware or the host"
            )
            if device.exists() and not os.access(device, os.R_OK | os.W_OK):
                hint = "let this user open it: usermod -aG kvm $USER, then log in again"
            yield check("kvm", "warn", f"not used: {probe.reason}", hint)
        elif probe.works:
            yield check(probe.name, True, probe.reason)
        else:
            yield check(probe.name, "warn", f"not used: {probe.reason}")
    if able.accelerator == "tcg":
        text = "guests get emulated CPUs (TCG): right everywhere, about ten times slower than hardware"
        yield check("accelerator", "warn", text, "nothing has to be done; with a working KVM it is used by itself")
    else:
        yield check("accelerator", bool(able.accelerator), f"guests get {able.accelerator or 'no'} CPUs")


def _privileges(facts: Facts, able: Capabilities | None) -> Check:
    said = able.confinement if able is not None else ""
    if facts.privileged:
        return check("privileges", True, said or "runs as root")
    return check("privileges", "warn", said or "runs as a plain user", "as root every VM would have its own user")


def _memory(facts: Facts) -> Check:
    text = f"{amount(facts.memory_available)} of {amount(facts.memory)} available"
    enough = facts.memory_available >= 512 * MIB
    return check(
        "memory", True if enough else "warn", text, "" if enough else "too little for a VM of the default size"
    )


def _disk(facts: Facts, state: Path) -> Check:
    text = f"{amount(facts.disk_free)} free at {state}"
    if facts.disk_free < 512 * MIB:
        return check("disk", False, text, "make room, or point CORRAL_STATE to another disk")
    return check("disk", True if facts.disk_free >= 4 * GIB else "warn", text)


def _network(root: Path) -> Check:
    device = root / "dev/net/tun"
    if device.exists() and os.access(device, os.R_OK | os.W_OK):
        return check(
            "network", True, "user-mode networking with published ports; /dev/net/tun is there, not needed yet"
        )
    return check("network", True, "user-mode networking with published ports (no /dev/net/tun, and none is needed)")


def _cgroups(root: Path) -> Check:
    base = root / "sys/fs/cgroup"
    if (base / "cgroup.controllers").exists() and (base / "cgroup.controllers").read_text().strip():
        kind, place = "v2", base
    elif (base / "cpu").exists():
        kind, place = "v1", base / "cpu"
    else:
        return check("cgroups", "warn", "no CPU controller: shares and caps cannot be enforced here")
    if os.access(place, os.W_OK):
        return check("cgroups", True, f"{kind}, writable")
    return check("cgroups", "warn", f"{kind}, not writable by this user: shares and caps are only advice")


PROGRAMS = (
    ("qemu-img", "makes disks", "apt install qemu-utils"),
    ("ssh-keygen", "makes Corral's key for `corral ssh`", "apt install openssh-client"),
    ("mkfs.ext4", "builds the debian image", "apt install e2fsprogs"),
    ("dpkg-deb", "builds images from Debian packages", "apt install dpkg"),
)


def _programs(which: Which) -> Iterator[Check]:
    for name, purpose, hint in PROGRAMS:
        path = which(name) or which(f"/usr/sbin/{name}") or which(f"/sbin/{name}")
        if path:
            yield check(name, True, f"{path} ({purpose})")
        else:
            yield check(name, False if name == "qemu-img" else "warn", f"not found ({purpose})", hint)
