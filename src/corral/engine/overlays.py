"""What freezing a machine means for its disks: each gets a fresh overlay, and what it was becomes a layer. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from corral.engine.protocol import Drive, Machine
from corral.errors import Invalid, Problem, Refused

MAX_LAYERS = 64
"""Every fork of a fork adds one; each costs QEMU an open file, and a read of something old a look into it."""


def check_overlays(machine: Machine, overlays: Mapping[str, Drive]) -> None:
    """Raise unless ``overlays`` is one for each writable drive, over what that drive is now."""
    problems = []
    writable = {drive.name: drive for drive in machine.drives if not drive.readonly}
    for name in sorted(writable.keys() ^ overlays.keys()):
        what = "has no overlay" if name in writable else "is no drive that is written to"
        problems.append(Problem("overlays", f"{name[:40]!r} {what}"))
    for name in sorted(writable.keys() & overlays.keys()):
        now, then = writable[name], overlays[name]
        layers = tuple(layer.format for layer in then.layers)
        if layers != tuple(layer.format for layer in now.chain) or then.format != "qcow2":
            problems.append(Problem("overlays", f"that of {name!r} is no qcow2 over what the drive is now"))
        # Limits may have been changed since it was started: they are no part of what is frozen.
        if msgspec.structs.replace(then, path=now.path, format=now.format, layers=now.layers, limits=now.limits) != now:
            problems.append(Problem("overlays", f"that of {name!r} is another drive"))
        if len(layers) > MAX_LAYERS:
            raise Refused(
                f"the disk {name} has {MAX_LAYERS} layers already",
                code="unsupported",
                hint="forks of forks have an end",
            )
    if problems:
        raise Invalid(problems)


def switched(machine: Machine, overlays: Mapping[str, Drive]) -> Machine:
    """The machine once it writes to the overlays."""
    drives = tuple(overlays.get(drive.name, drive) for drive in machine.drives)
    return msgspec.structs.replace(machine, drives=drives)


def frozen(machine: Machine, overlays: Mapping[str, Drive], own: Mapping[Path, Path]) -> Machine:
    """The machine as its template shows it: its disks are what lies under the overlays, by the template's ``own`` names
    where it has some.
    """

    def under(overlay: Drive) -> Drive:
        top, *rest = (msgspec.structs.replace(one, path=own.get(one.path, one.path)) for one in overlay.layers)
        return msgspec.structs.replace(overlay, path=top.path, format=top.format, layers=tuple(rest))

    drives = tuple(under(overlays[one.name]) if one.name in overlays else one for one in machine.drives)
    return msgspec.structs.replace(machine, drives=drives, joins=(), template=None)
