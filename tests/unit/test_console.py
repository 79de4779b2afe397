"""The serial line: nothing lost, nothing without bound, nobody held up."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from corral.console.ring import LogRing
from corral.console.serial import BURST, RATE, Consoles
from corral.console.session import BACKLOG, GAP, SerialReader
from corral.errors import Refused, Unavailable
from corral.runtime import Runtime


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


class Line:
    """QEMU's end of a serial line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.came = asyncio.Event()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append((reader, writer))
        self.came.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Line]:
        server = await asyncio.start_unix_server(self.accept, str(self.path))
        try:
            yield self
        finally:
            server.close()
            for _, writer in self.clients:
                writer.close()

    async def say(self, data: bytes) -> None:
        await asyncio.wait_for(self.came.wait(), 5)
        writer = self.clients[-1][1]
        writer.write(data)
        await asyncio.wait_for(writer.drain(), 5)


async def until(test: object, limit: float = 5.0) -> None:
    async with asyncio.timeout(limit):
        while not test():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def test_a_ring_keeps_the_end_and_never_grows_beyond_its_bound(root: Path) -> None:
    ring = LogRing(root / "vm" / "serial.log", 1000)
    for n in range(1000):
        ring.write(b"%06d\n" % n)
    assert sum(path.stat().st_size for path in (root / "vm").iterdir()) <= 1000
    assert ring.tail(14) == b"000998\n000999\n"
    assert len(ring.tail(10_000)) >= 500
    ring.write(b"x" * 5000)
    assert ring.tail(100) == b"x" * 100
    assert sum(path.stat().st_size for path in (root / "vm").iterdir()) <= 1000
    ring.close()
    again = LogRing(root / "vm" / "serial.log", 1000)
    again.write(b"after")
    assert again.tail(6) == b"xafter", "it survives the daemon"
    again.close()


def test_a_ring_on_a_full_disk_loses_log_and_nothing_else(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = LogRing(root / "serial.log")
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        ring.write(b"lost")
    ring.write(b"kept")
    assert ring.tail(10) == b"kept"
    ring.close()


async def test_a_reader_that_sleeps_loses_the_oldest_and_is_told() -> None:
    reader = SerialReader(b"")
    for n in range(100):
        reader.feed(b"%02d" % n + b"." * 10_000)
    reader.end()
    pieces = [piece async for piece in reader.output()]
    assert pieces[0] == GAP
    assert sum(map(len, pieces[1:])) <= BACKLOG
    assert pieces[-1].startswith(b"99")


async def test_what_the_guest_says_is_logged_shown_and_answered(root: Path) -> None:
    consoles = Consoles(root, Runtime())
    async with Line(root / "serial.sock").open() as line:
        await consoles.attach("vm", line.path)
        await line.say(b"booting\n")
        await until(lambda: consoles.tail("vm", 100) == b"booting\n")
        async with consoles.session("vm") as one, consoles.session("vm") as two:
            await line.say(b"login: ")
            for session in (one, two):
                output = session.output()
                assert await anext(output) == b"booting\n"
                assert await anext(output) == b"login: "
            await one.write(b"root\n")
            assert await asyncio.wait_for(line.clients[-1][0].read(10), 5) == b"root\n"
            with pytest.raises(Refused):
                await one.write(b"x" * 100_000)
            await consoles.detach("vm")
            assert [piece async for piece in one.output()] == [], "the session ends with the line"
            with pytest.raises(Unavailable):
                await one.write(b"too late")
    with pytest.raises(Refused, match="no open serial line"):
        async with consoles.session("vm"):
            pass
    assert [piece async for piece in consoles.follow("vm")] == [b"booting\nlogin: "]


async def test_a_line_that_is_not_there_yet_is_found_when_it_comes(root: Path) -> None:
    consoles = Consoles(root, Runtime())
    line = Line(root / "serial.sock")
    attaching = asyncio.create_task(consoles.attach("vm", line.path))
    await asyncio.sleep(0.1)
    async with line.open():
        await asyncio.wait_for(attaching, 5)
        await until(lambda: bool(line.clients))  # connected on our side is not yet accepted on the other
        line.clients[0][1].close()
        line.came.clear()
        await line.say(b"again\n")
        await until(lambda: consoles.tail("vm", 100) == b"again\n")
        await consoles.close()


async def test_a_deep_directory_is_no_obstacle(root: Path) -> None:
    deep = root.joinpath(*["d" * 50] * 4)
    deep.mkdir(parents=True)
    consoles = Consoles(deep, Runtime())
    before = Path.cwd()
    os.chdir(deep)
    try:
        server = await asyncio.start_unix_server(lambda r, w: w.write(b"hello\n"), "serial.sock")
    finally:
        os.chdir(before)
    await consoles.attach("vm", deep / "serial.sock")
    await until(lambda: consoles.tail("vm", 100) == b"hello\n")
    await consoles.close()
    server.close()


async def test_a_flooding_guest_is_slowed_down_by_its_own_socket(root: Path) -> None:
    consoles = Consoles(root, Runtime())
    async with Line(root / "serial.sock").open() as line:
        await consoles.attach("vm", line.path)
        await until(line.came.is_set)
        writer = line.clients[-1][1]
        sent = 0
        try:
            async with asyncio.timeout(1.5):
                while True:
                    writer.write(b"y" * 65536)
                    await writer.drain()
                    sent += 65536
        except TimeoutError:
            pass
        assert sent <= BURST + 3 * RATE + (2 << 20), "more was taken than is paid for"
        assert len(consoles.tail("vm", 10 << 20)) <= 1 << 20
        writer.transport.abort()
        await consoles.close()
