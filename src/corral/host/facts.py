"""Facts about this machine, each read from the kernel at the moment of asking."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

from corral.runtime.process import boot_id


class HostFacts(NamedTuple):
    """``memory`` and ``disk_free`` in bytes; ``cpus`` are those this process may use."""

    arch: str
    cpus: int
    memory: int
    memory_available: int
    disk_free: int
    kernel: str
    os: str
    boot_id: str
    privileged: bool
    memory_stalled: float = 0.0
    """Per cent of the last 10 s in which something waited for memory; 0 where the kernel does not say."""


def memory_info() -> tuple[int, int]:
    """Bytes of RAM: all, and available without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    return kib["MemTotal"] << 10, kib.get("MemAvailable", kib["MemFree"]) << 10


def memory_stalled() -> float:
    """The kernel's pressure figure for memory (``some avg10`` of PSI), per cent; 0 where it has none."""
    try:
        text = Path("/proc/pressure/memory").read_text()
    except OSError:  # not there, or switched off (EOPNOTSUPP when it is read)
        return 0.0
    some = next(line for line in text.splitlines() if line.startswith("some "))
    return float(dict(word.split("=") for word in some.split()[1:])["avg10"])


def os_name() -> str:
    """The distribution's name for people, like ``Debian GNU/Linux 12 (bookworm)``."""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def disk_free(path: Path) -> int:
    """Bytes that this user may still write on the file system of ``path`` (or of its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def facts(state: Path) -> HostFacts:
    """Everything at once; ``state`` is the directory whose disk counts."""
    total, available = memory_info()
    return HostFacts(
        arch=platform.machine(),
        cpus=len(os.sched_getaffinity(0)),
        memory=total,
        memory_available=available,
        disk_free=disk_free(state),
        kernel=platform.release(),
        os=os_name(),
        boot_id=boot_id(),
        privileged=os.geteuid() == 0,
        memory_stalled=memory_stalled(),
    )
