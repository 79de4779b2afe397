"""The serial lines of a host: one connection each, a log, and any number of people.

QEMU serves one client and throws output away while nobody is connected, so the line is opened right after the process
is made, before its CPUs run, and again after a restart of the daemon. Reading is paced: a guest that writes without end
is slowed down by its own full socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from corral.console.ring import BOUND, LogRing
from corral.console.session import SerialReader
from corral.errors import Refused, Unavailable
from corral.runtime import Runtime, deadline
from corral.runtime.sockets import reachable

log = structlog.get_logger("console")

CHUNK = 32 << 10
RATE = 256 << 10
"""Bytes a second that one line may cost us in the long run: 20 times what a 115,200 baud line could bring."""
BURST = 1 << 20
"""A boot's whole output passes at once."""
TAIL = 64 << 10
"""What a new reader is shown of the past."""
ATTACH_S = 2.0
WRITE_S = 5.0
MOST_INPUT = 64 << 10
"""Bytes of input in one piece."""
RETRY = (0.02, 2.0)
READERS = 32
"""People at one line."""


class SerialLine:
    """One VM's line: reconnects for as long as it is attached."""

    def __init__(self, socket: Path, ring: LogRing, rt: Runtime) -> None:
        self._socket, self.ring, self._rt = socket, ring, rt
        self._readers: set[SerialReader] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._writing = asyncio.Lock()
        self._connected = asyncio.Event()
        self._tokens, self._refilled = float(BURST), rt.clock.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=f"serial-{socket.parent}")

    async def connected(self) -> None:
        await self._connected.wait()

    async def _serve(self) -> None:
        delay = RETRY[0]
        while True:
            try:
                with reachable(self._socket) as name:
                    reader, self._writer = await asyncio.open_unix_connection(name, limit=CHUNK)
                delay = RETRY[0]
                self._connected.set()
                await self._pump(reader)
            except OSError as error:
                log.debug("serial line", socket=str(self._socket), error=str(error))
            finally:
                await self._hang_up()
            await self._rt.clock.sleep(delay)
            delay = min(delay * 2, RETRY[1])

    async def _pump(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK):
            self.ring.write(data)
            for one in self._readers:
                one.feed(data)
            await self._pace(len(data))

    async def _pace(self, count: int) -> None:
        """Token bucket: wait until what was read is paid for."""
        now = self._rt.clock.monotonic()
        self._tokens = min(float(BURST), self._tokens + (now - self._refilled) * RATE) - count
        self._refilled = now
        if self._tokens < 0:
            await self._rt.clock.sleep(-self._tokens / RATE)

    async def _hang_up(self) -> None:
        self._connected.clear()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    async def send(self, data: bytes) -> None:
        """Type into the line. Raises Unavailable when it is closed or the guest reads nothing for 5 s."""
        if len(data) > MOST_INPUT:
            raise Refused(f"{len(data)} bytes of input at once are too many", code="too-large")
        async with self._writing:
            if self._writer is None:
                raise Unavailable("the serial line is not connected")
            try:
                self._writer.write(data)
                async with deadline(WRITE_S, "typing into the serial console"):
                    await self._writer.drain()
            except OSError as error:
                raise Unavailable(f"the serial line broke: {error.strerror or error}") from error

    def open(self, *, typing: bool) -> SerialReader:
        """A new reader: the tail, then live."""
        if len(self._readers) >= READERS:
            raise Refused(f"{READERS} people read this console already", code="busy")
        reader = SerialReader(self.ring.tail(TAIL), self.send if typing else None)
        self._readers.add(reader)
        return reader

    def leave(self, reader: SerialReader) -> None:
        self._readers.discard(reader)

    async def close(self) -> None:
        """Hang up; the readers see the end. What QEMU wrote last is still taken in."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for reader in self._readers:
            reader.end()
        self._readers.clear()
        self.ring.close()


class Consoles:
    """All serial lines under ``root`` (CORRAL_STATE/vms): ``<id>/serial.log`` each. ``bound``: bytes of each log."""

    def __init__(self, root: Path, rt: Runtime, *, bound: int = BOUND) -> None:
        self._root, self._rt, self._bound = root, rt, bound
        self._lines: dict[str, SerialLine] = {}

    def _ring(self, vm_id: str) -> LogRing:
        return LogRing(self._root / vm_id / "serial.log", self._bound)

    async def attach(self, vm_id: str, socket: Path) -> None:
        """Listen from now on; returns when connected, or after 2 s, still trying."""
        if vm_id in self._lines:
            return
        line = self._lines[vm_id] = SerialLine(socket, self._ring(vm_id), self._rt)
        try:
            async with asyncio.timeout(ATTACH_S):
                await line.connected()
        except TimeoutError:
            log.warning("the serial line is not there yet", vm=vm_id)

    async def detach(self, vm_id: str) -> None:
        """The VM's process is gone; its log stays."""
        line = self._lines.pop(vm_id, None)
        if line is not None:
            await line.close()

    @asynccontextmanager
    async def session(self, vm_id: str) -> AsyncIterator[SerialReader]:
        """A person at the line. Raises Refused ``wrong-phase`` when the VM does not run."""
        line = self._lines.get(vm_id)
        if line is None:
            raise Refused("the VM has no open serial line", code="wrong-phase", hint="start it first")
        reader = line.open(typing=True)
        try:
            yield reader
        finally:
            line.leave(reader)

    def tail(self, vm_id: str, count: int) -> bytes:
        """The last ``count`` bytes of the log, whether the VM runs or not."""
        return self._ring(vm_id).tail(count)

    async def follow(self, vm_id: str) -> AsyncIterator[bytes]:
        """The tail, then whatever comes, until the VM's line closes; of a stopped VM only the tail."""
        line = self._lines.get(vm_id)
        if line is None:
            if tail := self.tail(vm_id, TAIL):
                yield tail
            return
        reader = line.open(typing=False)
        try:
            async for data in reader.output():
                yield data
        finally:
            line.leave(reader)

    async def close(self) -> None:
        """Hang up all lines; the VMs go on running."""
        for vm_id in list(self._lines):
            await self.detach(vm_id)
