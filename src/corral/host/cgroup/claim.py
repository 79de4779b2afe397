"""Whose a group is, written on it: so that what a state directory that is gone has left can be told, and removed.

A group is named after a digest of its state directory, from which nobody learns where that was. As an attribute of the
group the path goes away with it, at the latest when the host is booted again. With it stands the mount namespace that
the path is of: what is not there for us may well be there for a daemon in a container.

Nobody's is a group whose directory is not there. While it is, a daemon may come back to it at any moment, so what was
left in a directory that still exists is the next daemon's there. The kernel keeps what has a process. Services that
systemd keeps for us (:mod:`~corral.host.cgroup.systemd`) are not looked for: they have a process.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import structlog

from corral.errors import CorralError
from corral.host.cgroup import files
from corral.host.cgroup.protocol import Groups

log = structlog.get_logger("cgroup")

ATTRIBUTE = "trusted.corral.state"
PREFIX = "corral-"


def claim(groups: Groups, state: Path) -> None:
    """Sign the groups of a state directory, and remove those beside them that are nobody's. Never raises.

    Kernels without attributes of groups (before 3.16), and containers that may not write them, have nothing removed.
    """
    for parent in groups.parents:
        with contextlib.suppress(OSError):
            os.setxattr(parent, ATTRIBUTE, b"%s %s" % (_namespace(), os.fsencode(state.resolve())))
        for other in sorted(parent.parent.glob(f"{PREFIX}*")):
            if other != parent and _is_nobodys(other):
                _remove(other)


def _namespace() -> bytes:
    return os.fsencode(os.readlink("/proc/self/ns/mnt"))  # noqa: PTH115 - it is no path


def _is_nobodys(group: Path) -> bool:
    try:
        namespace, _, state = os.getxattr(group, ATTRIBUTE).partition(b" ")
    except OSError:
        return False
    if namespace != _namespace():
        return False
    try:
        os.lstat(state)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _remove(group: Path) -> None:
    for path in (*(group / name for name in files.children(group)), group):
        try:
            files.remove(path)
        except CorralError:  # a process is in it
            continue
    if not group.exists():
        log.info("a control group of nobody's was removed", group=str(group))
