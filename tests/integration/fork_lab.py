"""Guests on a bare engine, without a daemon: booted, frozen, forked. For the tests of forks."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from corral.engine.protocol import Card, Drive, KernelBoot, Layer, Machine, Template
from corral.engine.qemu.engine import QemuEngine
from corral.errors import Unavailable
from corral.guest.connect import connect
from corral.guest.protocol import Command, Ended, Guest, Output
from corral.runtime import Runtime
from corral.storage.seed import Seed, seed_iso
from tests.integration.platform import CACHE
from tests.probed import as_probed

CARD = Card(name="net0", mac="52:54:00:00:00:01", hostname="parent")


class Lab:
    """One engine, one image."""

    def __init__(self, root: Path, image: str, memory: int) -> None:
        self.rt, self.root, self.memory = Runtime(), root, memory
        as_probed(root)
        self.engine = QemuEngine(root / "vms", root, self.rt)
        # A copy: QEMU's user could not get through to a cache below somebody's home directory.
        self.image = shutil.copytree(image_directory(image), root / "image")
        self.manifest = json.loads((self.image / "manifest.json").read_text())

    def directory(self, id: str) -> Path:
        path = self.root / "vms" / id
        path.mkdir(parents=True)
        for one in (self.root / "vms", path):
            one.chmod(0o711)
        return path

    def machine(self, *, data: int = 0, cards: tuple[Card, ...] = (CARD,)) -> Machine:
        """``data``: bytes of a disk of its own beside what the image has."""
        id = self.rt.random.id()
        directory = self.directory(id)
        drives: tuple[Drive, ...] = ()
        if "disk.qcow2" in self.manifest["parts"]:
            layers = (Layer(path=self.image / "disk.qcow2", format="qcow2"),)
            seed = directory / "seed.iso"
            seed.write_bytes(seed_iso(Seed(instance_id=id, hostname="parent", default_user="root")))
            seed.chmod(0o600)
            root = overlay(directory / "root.qcow2", layers)
            drives = (Drive(name="root", path=root, format="qcow2", layers=layers),
                      Drive(name="seed", path=seed, format="raw", readonly=True))  # fmt: skip
        if data:
            disk = directory / "data.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(data)], check=True)
            drives += (Drive(name="data", path=disk, format="qcow2"),)
        kernel = KernelBoot(
            kernel=self.image / "kernel", initrd=self.image / "initrd", cmdline=self.manifest["cmdline"]
        )
        return Machine(id=id, name="parent", memory=self.memory, kernel=kernel, drives=drives, cards=cards)

    async def answer(self, id: str, timeout: float = 120) -> Guest:
        """A connection to its agent. One that is still at what it was frozen in gives up first, and is asked again."""
        channels = self.engine.channels(id)
        try:
            return await connect(channels.guest, channels.qga, self.rt, prefer="resident", timeout=timeout)
        except Unavailable:
            return await connect(channels.guest, channels.qga, self.rt, prefer="resident", timeout=timeout)

    async def freeze(self, machine: Machine) -> tuple[Template, Machine]:
        id = self.rt.random.id()
        drives = {}
        for drive in machine.drives:
            if not drive.readonly:
                path = overlay(drive.path.with_name(f"{drive.name}-{id}.qcow2"), drive.chain)
                drives[drive.name] = msgspec.structs.replace(drive, path=path, format="qcow2", layers=drive.chain)
        template = await self.engine.freeze(machine.id, id, drives)
        after = tuple(drives.get(drive.name, drive) for drive in machine.drives)
        return template, msgspec.structs.replace(machine, drives=after)

    def fork_of(self, template: Template) -> Machine:
        id = self.rt.random.id()
        directory = self.directory(id)
        drives = tuple(self._own(drive, directory) for drive in template.machine.drives)
        return msgspec.structs.replace(template.machine, id=id, name="fork", drives=drives, template=template.id)

    def _own(self, drive: Drive, directory: Path) -> Drive:
        """A fork's own disk in place of its template's: a fresh overlay, or a copy of a seed."""
        path = directory / drive.path.name
        if drive.readonly:
            shutil.copy(drive.path, path)
            return msgspec.structs.replace(drive, path=path)
        made = overlay(directory / f"{drive.name}.qcow2", drive.chain)
        return msgspec.structs.replace(drive, path=made, format="qcow2", layers=drive.chain)

    async def booted(self, machine: Machine) -> Guest:
        """Create, start, and wait for the guest's own start-up."""
        await self.engine.create(machine)
        await self.engine.resume(machine.id)
        guest = await self.answer(machine.id)
        async with asyncio.timeout(60):
            while not (await guest.info()).ready:
                await asyncio.sleep(0.2)
        return guest

    async def forked(self, template: Template) -> tuple[Machine, Guest]:
        """A fork that runs, and its guest; its cables are out."""
        machine = self.fork_of(template)
        await self.engine.create(machine)
        await self.engine.resume(machine.id)
        return machine, await self.answer(machine.id, 30)

    async def gone(self, id: str) -> None:
        await self.engine.kill(id)
        await self.engine.remove(id)
        shutil.rmtree(self.root / "vms" / id, ignore_errors=True)


def image_directory(name: str) -> Path:
    """The newest build of an image."""
    found = [
        path.parent for path in CACHE.glob("images/*/manifest.json") if json.loads(path.read_text())["name"] == name
    ]
    assert found, f"no image {name} in {CACHE}: corral image build {name}"
    return max(found, key=lambda path: path.stat().st_mtime)


def overlay(path: Path, layers: tuple[Layer, ...]) -> Path:
    base = layers[0]
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", base.format, "-b", str(base.path), str(path)], check=True
    )
    return path


def anonymous(pid: int) -> int:
    """MiB that a process has of its own. (A template's page that one fork maps counts as its private one elsewhere.)"""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) >> 10


async def sh(guest: Guest, script: str, timeout: float = 30) -> str:
    """What a shell line in the guest prints."""
    async with asyncio.timeout(timeout):
        process = await guest.run(Command(argv=("sh", "-c", script)))
        text = b""
        try:
            async for piece in process.output():
                if isinstance(piece, Ended):
                    return text.decode(errors="replace")
                assert isinstance(piece, Output)
                text += piece.data
        finally:
            await process.close()
    raise AssertionError("the program never ended")


def run_to_its_end(work: Coroutine[Any, Any, None]) -> int:
    """Run a program of forks; Ctrl-C and SIGTERM cancel it, so that what it started is ended. The exit status."""

    async def main() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        told: list[int] = []

        def cancel(number: int) -> None:
            if not told:  # once: clearing away is not to be cancelled too
                told.append(number)
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, cancel, number)
        try:
            await work
        except asyncio.CancelledError:
            raise SystemExit(128 + told[0]) from None

    asyncio.run(main())
    return 0


@asynccontextmanager
async def lab_of(image: str, memory: int) -> AsyncIterator[Lab]:
    root = Path(tempfile.mkdtemp(prefix="corral-fork-", dir="/tmp"))
    root.chmod(0o711)
    lab = Lab(root, image, memory)
    try:
        yield lab
    finally:
        for seen in await lab.engine.inventory():
            await lab.engine.kill(seen.id)
            await lab.engine.remove(seen.id)
        for template in await lab.engine.templates():
            await lab.engine.discard(template.id)
        await lab.engine.close()
        shutil.rmtree(root)
