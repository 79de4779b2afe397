"""What only a store on disk promises: surviving SIGKILL, full and damaged disks, one process, few fsyncs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from corral.errors import CorralError, Refused, Unavailable, Unknown, WatchLost
from corral.runtime import Runtime
from corral.store.logfile import LogFile
from corral.store.protocol import Batch, Compare, Delete, Put
from corral.store.sqlite import SqliteStore

WRITER = """
import asyncio, os, sys
from pathlib import Path
from corral.runtime import Runtime
from corral.store.protocol import Put, Compare
from corral.store.sqlite import SqliteStore

async def main(path):
    store = await SqliteStore(Path(path), Runtime(), history=20).open()
    async def write(name):
        for number in range(1_000_000):
            key, other = f"/{name}/{number}", f"/pair/{name}/{number}"
            await store.txn([Compare(key, "mod", "==", 0)], [Put(key, b"x" * 500), Put(other, b"y")])
            os.write(1, f"{key}\\n".encode())
    await asyncio.gather(*(write(f"{os.getpid()}-{n}") for n in range(20)))

asyncio.run(main(sys.argv[1]))
"""


async def opened(path: Path, **options: int) -> SqliteStore:
    return await SqliteStore(path, Runtime(), **options).open()


def start_writer(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)


async def test_everything_acknowledged_is_there_after_sigkill(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "store.db", set[str]()
    choice = random.Random(1)
    for _ in range(4):
        with start_writer(path) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(choice.randrange(1, 900))]
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        acknowledged |= {line.decode().strip() for line in lines if line.endswith(b"\n")}
    store = await opened(path)
    present = {entry.key for entry in (await store.range("/")).entries}
    assert len(acknowledged) > 500
    assert acknowledged <= present
    single = {key for key in present if not key.startswith("/pair")}
    assert {f"/pair{key}" for key in single} == present - single, "half a transaction survived"
    await store.close()


async def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with start_writer(path) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(Refused) as caught:
            await opened(path)
        assert caught.value.code == "in-use"
        assert len([writer.stdout.readline() for _ in range(200)]) == 200
        writer.kill()
    await (await opened(path)).close()


async def test_one_fsync_acknowledges_many_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened(tmp_path / "store.db")
    groups: list[int] = []
    append = LogFile.append

    def counted(self: LogFile, batches: list, dropped: list, ended: list) -> None:  # type: ignore[type-arg]
        groups.append(len(batches))
        append(self, batches, dropped, ended)

    monkeypatch.setattr(LogFile, "append", counted)
    await asyncio.gather(*(store.txn([], [Put(f"/{number}", b"v")]) for number in range(1000)))
    assert sum(groups) == 1000
    assert len(groups) <= 10
    await store.close()


async def test_every_commit_is_an_fsync(tmp_path: Path) -> None:
    store = await opened(tmp_path / "store.db")
    query = "SELECT * FROM pragma_synchronous, pragma_journal_mode, pragma_locking_mode"
    assert await store._in_thread(lambda: store._log._db.execute(query).fetchone()) == (2, "wal", "exclusive")
    await store.close()


async def test_what_is_not_durable_yet_is_seen_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await opened(tmp_path / "store.db")

    def broken(*_: object) -> None:
        raise Unknown("the disk went away")

    monkeypatch.setattr(LogFile, "append", broken)
    with pytest.raises(Unknown):
        await store.txn([], [Put("/a", b"1")])
    assert await store.get("/a") is None
    with pytest.raises(Unavailable, match="the disk went away"):
        await store.txn([], [Put("/b", b"1")])
    await store.close()


async def limit_pages(store: SqliteStore, pages: int) -> None:
    await store._in_thread(lambda: store._log._db.execute(f"PRAGMA max_page_count = {pages}"))


async def test_a_full_disk_refuses_writes_and_loses_nothing(tmp_path: Path) -> None:
    store = await opened(tmp_path / "store.db")
    await store.txn([], [Put("/kept", b"1")])
    await limit_pages(store, 10)
    with pytest.raises(Unavailable, match="cannot grow"):
        await store.txn([Compare("/big", "mod", "==", 0)], [Put("/big", b"x" * 200_000)])
    await limit_pages(store, 1_000_000)
    result = await store.txn([], [Put("/after", b"2")])
    await store.close()
    store = await opened(tmp_path / "store.db")
    assert [entry.key for entry in (await store.range("/")).entries] == ["/after", "/kept"]
    assert result.revision == 2
    await store.close()


async def filled(path: Path) -> None:
    store = await opened(path)
    for number in range(50):
        await store.txn([], [Put(f"/{number}", b"value of number %d" % number * 40)])
    await store.close()


@pytest.mark.parametrize("damage", ["value", "middle", "truncated", "garbage"])
async def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    content = bytearray(path.read_bytes())
    if damage == "value":
        content[content.index(b"value of number 20") + 3] ^= 1
    elif damage == "middle":
        content[8192:12288] = bytes(4096)
    elif damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[:] = b"this is no database" * 500
    path.write_bytes(content)
    with pytest.raises(CorralError, match="damaged") as caught:
        await opened(path)
    assert str(path) in caught.value.message
    assert "backup" in caught.value.hint
    assert path.read_bytes() == content, "a damaged file is evidence"


async def test_a_lost_row_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM log WHERE key = '/20'")
    database.close()
    with pytest.raises(CorralError, match="damaged"):
        await opened(path)


async def test_files_of_other_programs_and_other_formats_are_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE mine (x)")
    database.close()
    with pytest.raises(Refused, match="another program"):
        await opened(tmp_path / "other.db")
    await filled(tmp_path / "store.db")
    with sqlite3.connect(tmp_path / "store.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(Refused, match="format 99"):
        await opened(tmp_path / "store.db")


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be opened"):
        await opened(tmp_path / "missing" / "store.db")


async def test_the_file_does_not_grow_with_the_number_of_changes(tmp_path: Path) -> None:
    store = await opened(tmp_path / "store.db", history=50)
    for _ in range(40):
        await asyncio.gather(*(store.txn([], [Put(f"/{number}", os.urandom(1000))]) for number in range(50)))
    await store.close()
    assert (tmp_path / "store.db").stat().st_size < 1_000_000, "2,000 changes of 1 KB, of which 150 are kept"
    store = await opened(tmp_path / "store.db", history=50)
    assert (await store.range("/")).revision == 2000
    assert len((await store.range("/")).entries) == 50
    await store.close()


async def test_what_is_told_of_the_past_is_the_same_after_reopening(tmp_path: Path) -> None:
    path, published = tmp_path / "store.db", list[Batch]()
    ops = [Put("/a", b"1"), Put("/b", b"2"), Put("/a", b"3"), Delete("/a"), Put("/b", b"4"), Delete("/b")]
    for number in range(36):
        store = await opened(path, history=3)
        await store.txn([], [ops[number % len(ops)]])
        published.append(await anext(store.watch("/", number + 1)))
        await store.close()
        store = await opened(path, history=3)
        complete = 0
        for start in range(1, number + 2):
            try:
                watch = store.watch("/", start)
                told = [await anext(watch) for _ in published[start - 1 :]]
            except WatchLost:
                assert start <= number + 1 - 3, "lost, although the promised history holds it"
                continue
            assert told == published[start - 1 :]
            complete += 1
        assert complete >= min(3, number + 1)
        await store.close()
