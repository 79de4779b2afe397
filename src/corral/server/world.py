"""What the agent joins on a real host."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from corral.agent.forwards import SocketProbe
from corral.agent.ports import Joined
from corral.engine.protocol import Engine
from corral.runtime import Runtime
from corral.server.home import Home


class World(NamedTuple):
    """A hypervisor and everything beside it. ``catalogue``: what images can be had."""

    engine: Engine
    joined: Joined
    catalogue: Sequence[Mapping[str, Any]]


def real(home: Home, rt: Runtime) -> World:
    """QEMU, and this machine's disks."""
    from corral.agent.grants.process import GovernorProcess
    from corral.console.serial import Consoles
    from corral.engine.qemu.engine import QemuEngine
    from corral.guest.binary import DIRECTORY
    from corral.guest.connect import connect
    from corral.host import cgroup
    from corral.host.facts import facts
    from corral.host.hostkey import host_key
    from corral.images.store import ImageStore
    from corral.storage.qemu_img import QemuImg
    from corral.storage.volumes import Volumes

    qemu_img = QemuImg()
    images = ImageStore(home.images, home.cache, rt, converter=qemu_img, agent_binaries=DIRECTORY)
    images.sweep()
    groups = cgroup.choose(home.state)
    cgroup.claim(groups, home.state)
    joined = Joined(
        images=images, disks=Volumes(home.vms, rt, qemu_img), connect_guest=connect,
        consoles=Consoles(home.vms, rt), facts=functools.partial(facts, home.state), ports=SocketProbe(),
        groups=groups, governing=GovernorProcess(home.state, rt), held=_held,
        host_key=host_key, own=_own,
    )  # fmt: skip
    return World(QemuEngine(home.vms, home.state, rt), joined, offered())


async def _held(pids: Sequence[int]) -> list[int | None]:
    """In a thread: the kernel walks the page tables of each, milliseconds for a large guest."""
    from corral.host.process import held

    return await asyncio.to_thread(lambda: [held(pid) for pid in pids])


async def _own(pids: Sequence[int]) -> list[int | None]:
    from corral.host.process import own

    return await asyncio.to_thread(lambda: [own(pid) for pid in pids])


def offered() -> list[dict[str, Any]]:
    """What can be built here, and what can be fetched."""
    from corral.images.catalogue import catalogue

    built = [
        {"name": "debian", "source": "build", "description": "Debian with systemd, ssh and python3, built here"},
        {"name": "micro", "source": "build", "description": "a kernel and busybox in RAM, built here"},
    ]
    listed = [{"name": e.name, "source": "catalogue", "arch": e.arch, "description": e.title} for e in catalogue()]
    return sorted(built + listed, key=lambda entry: (entry["name"], entry.get("arch", "")))
