"""Guests that are not Corral's, with the same agent in them: started by hand, started and restored by libvirt.

A small client asks the agent what Corral's daemon asks it: until it answers, and to make its guest somebody. Disks are
made, and a saved guest's put back as they were, before the time begins.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from corral.errors import Unavailable
from corral.guest.protocol import Identity
from corral.guest.resident import Resident, open_resident
from corral.runtime import Runtime
from peers.libvirtd import Libvirtd
from peers.pattern import Pattern, pattern_of
from peers.started import Started, anonymous, children_cpu, cpu_of

PATIENCE_S = 120.0
REST_S = 3.0
"""After a guest's start-up is done, before it is saved."""


class Saved(NamedTuple):
    """A saved guest: its file, its disk in place, and that disk as it was."""

    file: Path
    disk: Path | None
    kept: Path | None


@dataclass(frozen=True)
class Peers:
    """Guests like ``pattern``."""

    pattern: Pattern

    @classmethod
    @contextmanager
    def like(cls, pid: int) -> Iterator[Peers]:
        """Like a VM of Corral's that runs now; its seed is kept, for it may be deleted."""
        with tempfile.TemporaryDirectory(prefix="corral-pattern-") as name:
            pattern = pattern_of(pid)
            if pattern.seed is not None:
                pattern = replace(pattern, seed=Path(shutil.copy(pattern.seed, name)))
            yield cls(pattern)

    def by_hand(self) -> Started:
        with tempfile.TemporaryDirectory(prefix="corral-raw-") as name:
            where = Path(name)
            disks = self.pattern.disks(where)
            began = time.monotonic()
            process = self.pattern.qemu(where, disks)
            try:
                answer, identity = asyncio.run(met(where / "guest.sock", booted, lambda: process.poll() is None))
                return Started(
                    answer - began, identity - began, cpu=cpu_of([process.pid]), own=anonymous(process.pid)
                )  # fmt: skip
            finally:
                process.kill()
                process.wait()

    def virsh_start(self, daemon: Libvirtd) -> Started:
        with tempfile.TemporaryDirectory(dir=daemon.where) as name:
            domain = self._defined(daemon, Path(name))
            try:
                return _measured(daemon, domain, Path(name) / "guest.sock", booted, "start", domain)
            finally:
                daemon.virsh("destroy", domain)
                daemon.virsh("undefine", domain)

    def virsh_save(self, daemon: Libvirtd) -> Saved:
        """One that has nothing left to start, saved; somebody is connected to its agent, as when Corral freezes one."""
        where = Path(tempfile.mkdtemp(dir=daemon.where))
        domain = self._defined(daemon, where)
        daemon.virsh("start", domain)

        async def save() -> None:
            guest = await greeted(where / "guest.sock", lambda: True)
            while not (await guest.info()).ready:
                await asyncio.sleep(0.5)
            await asyncio.sleep(REST_S)
            await asyncio.to_thread(daemon.virsh, "save", domain, str(where / "saved"))
            await guest.close()

        asyncio.run(save())
        disk = where / "root.qcow2"
        if not disk.exists():
            return Saved(where / "saved", None, None)
        return Saved(where / "saved", disk, Path(shutil.copy(disk, where / "root.kept")))

    def virsh_restore(self, daemon: Libvirtd, saved: Saved) -> Started:
        if saved.disk is not None and saved.kept is not None:
            shutil.copy(saved.kept, saved.disk)
        domain = _name(saved.file.parent)
        try:
            return _measured(daemon, domain, saved.file.parent / "guest.sock", forked, "restore", str(saved.file))
        finally:
            daemon.virsh("destroy", domain)

    def _defined(self, daemon: Libvirtd, where: Path) -> str:
        domain = _name(where)
        (where / "domain.xml").write_text(self.pattern.domain(domain, where, self.pattern.disks(where)))
        daemon.virsh("define", str(where / "domain.xml"))
        return domain


def _name(where: Path) -> str:
    """A domain's, after the directory of its files."""
    return f"bench-{where.name}"


def _measured(daemon: Libvirtd, domain: str, agent: Path, identity: Callable[[], Identity], *command: str) -> Started:
    spent, own, began = cpu_of([daemon.pid]), children_cpu(), time.monotonic()
    daemon.virsh(*command)
    answer, done = asyncio.run(met(agent, identity, lambda: True))
    qemu = daemon.qemu(domain)
    cpu = cpu_of([daemon.pid, qemu]) - spent + children_cpu() - own
    return Started(answer - began, done - began, cpu=cpu, own=anonymous(qemu))


def booted() -> Identity:
    """What a guest is told after a boot: its disk says the rest, or it has made that itself."""
    return Identity(time=time.time(), seed=os.urandom(32), hostname="booted")


def forked() -> Identity:
    """What a guest is told that was somebody else."""
    return Identity(
        time=time.time(), seed=os.urandom(32), hostname="fork", machine_id=os.urandom(16).hex(),
        ssh_host_key=b"PRIVATE\n", ssh_host_key_public=b"ssh-ed25519 AAAA\n", mac="52:54:00:12:34:56",
        address="10.0.2.16/24", gateway="10.0.2.2",
    )  # fmt: skip


async def met(agent: Path, identity: Callable[[], Identity], lives: Callable[[], bool]) -> tuple[float, float]:
    """When a guest's agent answered, and when it had made its guest somebody; monotonic."""
    guest = await greeted(agent, lives)
    answer = time.monotonic()
    await guest.identify(identity(), timeout=30)
    done = time.monotonic()
    await guest.close()
    return answer, done


async def greeted(agent: Path, lives: Callable[[], bool]) -> Resident:
    """The agent behind a socket of QEMU's, as soon as there is one. One that was saved in the middle of something gives
    that up first, and is asked again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await open_resident(agent, Runtime(), timeout=PATIENCE_S)
        except Unavailable:
            if not lives() or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.002)
