"""The SQLite file of :class:`~corral.store.sqlite.SqliteStore`: one append-only log table. Blocking; one thread only.

A row is one change of one key. ``id = revision * 4096 + place in the transaction`` keeps rows of a revision together
and in order without a second index. Each row carries a CRC-32 of itself: SQLite checks its write-ahead log, not the
pages of the main file, so a flipped bit would otherwise be believed. Compaction deletes rows that nothing needs any
more: older values of a key, and deletions, from before the kept history.

SQLite before 3.51.3 can corrupt a write-ahead log that two connections write and checkpoint, so there is exactly one
connection, with ``locking_mode=EXCLUSIVE``; that also is the lock that keeps a second process out. ``synchronous=FULL``
makes each COMMIT an fsync.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from corral.errors import CorralError, Refused, Unavailable, Unknown
from corral.store.index import Index
from corral.store.protocol import Batch, Change, Entry

FORMAT = 1
APPLICATION_ID = 0x436F7272  # "Corr": tells a store from any other SQLite file
_SPAN = 4096  # ids of one revision; more than index.MAX_OPS
_RESTORE = "restore the file from a backup, or move it away and start with an empty store"

_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE log (id INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB, created INTEGER NOT NULL,
                  version INTEGER NOT NULL, lease INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE lease (id INTEGER PRIMARY KEY, ttl REAL NOT NULL);
CREATE TABLE compacted (revision INTEGER NOT NULL);
INSERT INTO compacted VALUES (0);
"""

Row = tuple[int, str, bytes | None, int, int, int, int]


class LogFile:
    """An open, locked log. All methods block and must be called from one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or create the file and lock it. Raises Refused ``in-use`` or CorralError with what to do."""
        try:
            # autocommit (isolation_level None): transactions are ours to begin and end.
            self._database = sqlite3.connect(self.path, timeout=0.0, isolation_level=None)
            self._prepare(self._database)
        except sqlite3.Error as error:
            self.close()
            raise self._explain_open(error) from error
        except CorralError:
            self.close()
            raise

    def load(self, index: Index) -> dict[int, float]:
        """Fill an empty index; returns the leases with their times to live, seconds."""
        try:
            (index.compacted,) = self._db.execute("SELECT revision FROM compacted").fetchone()
            index.revision = index.compacted
            cursor = self._db.execute("SELECT id, key, value, created, version, lease, crc FROM log ORDER BY id")
            leases: dict[int, float] = dict(self._db.execute("SELECT id, ttl FROM lease").fetchall())
            index.leases.update((lease, set()) for lease in leases)
            for revision, entries in self._by_revision(cursor):
                if revision <= index.compacted:
                    for key, entry in entries:
                        if entry is None:
                            raise self._damaged(f"a deletion of {key} below the kept history")
                        index.restore(entry)
                elif revision != index.revision + 1:
                    raise self._damaged(f"revision {revision} follows {index.revision}")
                else:
                    changes = (Change(key, entry, index.get(key)) for key, entry in entries)
                    index.apply(Batch(revision, tuple(changes)))
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from error
        return leases

    def append(self, batches: Sequence[Batch], dropped: Sequence[Batch], ended_leases: Sequence[int]) -> None:
        """Make batches durable, forget what ``dropped`` ones made obsolete: one transaction, one fsync.

        Raises Unavailable (the disk is full; nothing happened) or Unknown (the disk failed: do not go on).
        """
        rows = [row for batch in batches for row in _rows(batch)]
        try:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO log VALUES (?,?,?,?,?,?,?)", rows)
            self._db.executemany("DELETE FROM lease WHERE id = ?", [(lease,) for lease in ended_leases])
            if dropped:
                self._db.executemany(
                    "DELETE FROM log WHERE id >= ? AND id < ? AND key = ?",
                    [span for batch in dropped for span in _obsolete(batch)],
                )
                self._db.execute("UPDATE compacted SET revision = ?", (dropped[-1].revision,))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def add_lease(self, lease: int, ttl_s: float) -> None:
        """Record a lease. Errors as :meth:`append`."""
        try:
            self._db.execute("INSERT INTO lease VALUES (?,?)", (lease, ttl_s))
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Checkpoint, close and unlock."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._database is not None, "the log is not open"
        return self._database

    def _prepare(self, database: sqlite3.Connection) -> None:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")  # takes the lock now, not at the first write
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == 0 and tables == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
        elif application != APPLICATION_ID:
            raise Refused(f"{self.path} is an SQLite file of another program", code="in-use")
        elif version != FORMAT:
            raise Refused(
                f"{self.path} has format {version}; this Corral reads format {FORMAT}", code="unsupported",
                hint="use the version of Corral that wrote it",
            )  # fmt: skip
        database.execute("COMMIT")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)

    def _by_revision(self, rows: sqlite3.Cursor) -> Iterator[tuple[int, list[tuple[str, Entry | None]]]]:
        revision, entries = 0, list[tuple[str, Entry | None]]()
        for row in rows:
            id, key, value, created, version, lease, crc = row
            if crc != _crc(row):
                raise self._damaged(f"the record of {key!r} at revision {id // _SPAN} is not what was written")
            if id // _SPAN != revision:
                if entries:
                    yield revision, entries
                revision, entries = id // _SPAN, []
            entry = None if value is None else Entry(key, value, created, revision, version, lease)
            entries.append((key, entry))
        if entries:
            yield revision, entries

    def _failed(self, error: sqlite3.Error) -> CorralError:
        with suppress(sqlite3.Error):  # what matters is the first error; a failed rollback adds nothing to it
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            # The commit record comes last, so a log that has no room for it holds nothing of the transaction.
            return Unavailable(f"{self.path} cannot grow: {error}", hint="free some disk space")
        return Unknown(
            f"writing to {self.path} failed: {error}",
            hint="look at the disk, then restart the daemon and read the state",
        )

    def _explain_open(self, error: sqlite3.Error) -> CorralError:
        number = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if number in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Refused(
                f"another process has {self.path} open",
                code="in-use",
                hint="stop the other daemon, or use another state",
            )
        if number in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        return Unavailable(f"{self.path} cannot be opened: {error}", hint="does the directory exist, is it writable?")

    def _damaged(self, what: str) -> CorralError:
        return CorralError(f"the store {self.path} is damaged: {what}", hint=_RESTORE)


def _crc(row: Row) -> int:
    id, key, value, created, version, lease, _ = row
    head = f"{id},{created},{version},{lease},{value is None},{key}".encode()
    return zlib.crc32(value or b"", zlib.crc32(head))


def _rows(batch: Batch) -> Iterator[Row]:
    for place, change in enumerate(batch.changes):
        entry = change.entry
        value, created, version, lease = (
            (None, 0, 0, 0) if entry is None else (entry.value, entry.create_revision, entry.version, entry.lease)
        )
        row = (batch.revision * _SPAN + place, change.key, value, created, version, lease, 0)
        yield (*row[:6], _crc(row))


def _obsolete(batch: Batch) -> Iterator[tuple[int, int, str]]:
    """Rows (first id, end, key) that are needed no more once ``batch`` leaves the history."""
    for change in batch.changes:
        if change.previous is not None:
            yield change.previous.mod_revision * _SPAN, (change.previous.mod_revision + 1) * _SPAN, change.key
        if change.entry is None:
            yield batch.revision * _SPAN, (batch.revision + 1) * _SPAN, change.key
