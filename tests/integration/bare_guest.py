"""A guest under plain QEMU, without Corral's engine: what an image can do by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from corral.guest.connect import connect
from corral.guest.protocol import Command, Ended, Guest, Output
from corral.images.files import ImageFiles
from corral.runtime import Runtime

QEMU = "qemu-system-x86_64"


class Booted:
    """A running guest: its agent, its serial line so far, and how long it took to answer."""

    def __init__(self, guest: Guest, directory: Path, seconds: float, process: subprocess.Popen[bytes]) -> None:
        self.guest, self.directory, self.seconds, self.process = guest, directory, seconds, process

    @property
    def serial(self) -> str:
        return (self.directory / "serial.log").read_text(errors="replace")

    async def sh(self, script: str, timeout: float = 30) -> tuple[int, str]:
        """Run a shell line in the guest: status and everything it printed."""
        async with asyncio.timeout(timeout):
            process = await self.guest.run(Command(argv=("sh", "-c", script)))
            text = b""
            try:
                async for piece in process.output():
                    if isinstance(piece, Output):
                        text += piece.data
                    elif isinstance(piece, Ended):
                        return piece.status, text.decode(errors="replace")
            finally:
                await process.close()
        raise AssertionError("the program never ended")

    async def ready(self, timeout: float = 60) -> None:
        """Wait until the image's own start-up is done."""
        async with asyncio.timeout(timeout):
            while not (await self.guest.info()).ready:
                await asyncio.sleep(0.3)

    async def type(self, text: str) -> None:
        """Type at the serial console."""
        _, writer = await asyncio.open_unix_connection(str(self.directory / "console"))
        writer.write(text.encode())
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()

    async def power_button(self) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self.directory / "qmp"))
        await reader.readline()
        for command in ("qmp_capabilities", "system_powerdown"):
            writer.write(json.dumps({"execute": command}).encode() + b"\n")
            await reader.readline()
        writer.close()

    async def ended(self, timeout: float = 30) -> None:
        """Wait until QEMU is gone."""
        async with asyncio.timeout(timeout):
            while self.process.poll() is None:
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def booted(
    files: ImageFiles, *, memory_mib: int, seed: Path | None = None, timeout: float = 100
) -> AsyncIterator[Booted]:
    """The guest from power on until its agent answers; the power is cut when the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    try:
        with (directory / "stderr").open("wb") as stderr:
            argv = _argv(files, directory, memory_mib, seed)
            started = time.monotonic()
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr)
        try:
            while not (directory / "guest").exists():
                assert process.poll() is None, (directory / "stderr").read_text()
                await asyncio.sleep(0.02)
            rt = Runtime()
            guest = await connect(directory / "guest", directory / "qga", rt, prefer="resident", timeout=timeout)
            try:
                yield Booted(guest, directory, time.monotonic() - started, process)
            finally:
                await guest.close()
        except BaseException:
            sys.stderr.write((directory / "serial.log").read_text(errors="replace")[-3000:])  # pytest shows it
            raise
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(directory)


def _argv(files: ImageFiles, directory: Path, memory_mib: int, seed: Path | None) -> list[str]:
    argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg,thread=multi,tb-size=64"]
    argv += ["-M", "q35", "-cpu", "qemu64,+rdrand", "-m", str(memory_mib), "-no-reboot", "-append", files.cmdline]
    argv += ["-kernel", str(files.kernel), "-initrd", str(files.initrd)]
    for name in ("console", "guest", "qmp", "qga"):
        log = f",logfile={directory}/serial.log" if name == "console" else ""
        argv += ["-chardev", f"socket,id={name},path={directory}/{name},server=on,wait=off{log}"]
    argv += ["-serial", "chardev:console", "-mon", "chardev=qmp,mode=control", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=guest,name=org.corral.guest.0"]
    argv += ["-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"]
    argv += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    if seed is not None:
        argv += ["-drive", f"if=virtio,format=raw,readonly=on,file={seed}"]
    return argv


def cache() -> Path:
    """Where builds are kept between test runs."""
    return Path(os.environ.get("CORRAL_CACHE", Path(__file__).parents[2] / ".cache"))
