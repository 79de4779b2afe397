"""The state of a store in memory: keys, bounded history, leases. Pure and synchronous; every local store stands on it.

A transaction is first *drafted* (:class:`Draft`: compared against the index plus what earlier drafts of the same group
did), then, once it is durable, *applied* (:meth:`Index.apply`). What is drafted but not applied is seen by nobody, so
that no reader ever sees a change that a power cut could take back.

History is a run of consecutive batches; :meth:`Index.since` reads it, :meth:`Index.forget` shortens it. A watcher is
only a position in it: a slow one costs no memory and learns by :class:`~corral.errors.WatchLost` that it was too slow.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

from corral.errors import NotFound, Problem, Refused, WatchLost
from corral.store.protocol import Batch, Change, Compare, Delete, Entry, Op, Put, Snapshot, TxnResult

MAX_OPS = 1024
"""Operations in one transaction: bounds a batch, and the rows of one revision in the SQLite log."""

MAX_VALUE = 2 << 20
"""Bytes of one value. Records are a few KiB; more is a mistake."""

LEAST = 256
"""Batches that are kept however large they are: who watches is a few behind."""

_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


class Index:
    """Everything a local store knows. ``history`` holds the batches ``compacted + 1 … revision``, one each."""

    def __init__(self) -> None:
        self.revision = 0
        self.compacted = 0
        self.history: list[Batch] = []
        self.size = 0
        """Bytes of all values in the history."""
        self.leases: dict[int, set[str]] = {}
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def range(self, prefix: str, start: str, limit: int) -> Snapshot:
        """Entries under ``prefix`` from ``start`` on, in key order, at most ``limit`` (0: all)."""
        found: list[Entry] = []
        for position in range(bisect_left(self._keys, max(prefix, start)), len(self._keys)):
            key = self._keys[position]
            if not key.startswith(prefix) or (limit and len(found) >= limit):
                break
            found.append(self._entries[key])
        return Snapshot(tuple(found), self.revision)

    def since(self, revision: int) -> Sequence[Batch]:
        """The batches from ``revision`` on. Raises WatchLost when some of them are gone."""
        if revision <= self.compacted and self.compacted:
            raise WatchLost(
                f"changes from revision {revision} were asked for; the history begins at {self.compacted + 1}",
                hint="list again and watch from the revision of that list",
            )
        return self.history[max(0, revision - self.compacted - 1) :]

    def apply(self, batch: Batch) -> None:
        """Make a drafted batch visible."""
        assert batch.revision == self.revision + 1, f"revision {batch.revision} after {self.revision}"
        for change in batch.changes:
            self._set(change)
        self.revision = batch.revision
        self.history.append(batch)
        self.size += _size(batch)

    def restore(self, entry: Entry) -> None:
        """Set an entry from before the kept history (only while a store is being opened)."""
        assert not self.history
        assert entry.mod_revision <= self.compacted
        self._set(Change(entry.key, entry, None))

    def surplus(self, batches: int, size: int) -> Sequence[Batch]:
        """The oldest batches, beyond which ``batches`` or ``size`` bytes of values are left.

        None until there is twice as much: so forgetting is rare and its cost shared.
        """
        if len(self.history) <= 2 * batches and self.size <= 2 * size:
            return ()
        number, left = max(0, len(self.history) - batches), self.size
        left -= sum(map(_size, self.history[:number]))
        most = len(self.history) - min(LEAST, batches)
        while left > size and number < most:
            left -= _size(self.history[number])
            number += 1
        return self.history[:number]

    def forget(self, dropped: Sequence[Batch]) -> None:
        """Shorten the history by its oldest batches."""
        del self.history[: len(dropped)]
        self.compacted += len(dropped)
        self.size -= sum(map(_size, dropped))

    def _set(self, change: Change) -> None:
        key, entry = change.key, change.entry
        old = self._entries.get(key)
        if old is not None and old.lease and old.lease in self.leases:
            self.leases[old.lease].discard(key)
        if entry is None:
            del self._entries[key]
            del self._keys[bisect_left(self._keys, key)]
            return
        if old is None:
            insort(self._keys, key)
        self._entries[key] = entry
        if entry.lease:
            self.leases.setdefault(entry.lease, set()).add(key)


class Draft:
    """A group of transactions on top of an index, not yet visible. ``batches`` is what to make durable, then apply."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._changed: dict[str, Entry | None] = {}
        self._ended: set[int] = set()
        self.revision = index.revision
        self.batches: list[Batch] = []

    def get(self, key: str) -> Entry | None:
        return self._changed[key] if key in self._changed else self._index.get(key)

    def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op]) -> TxnResult:
        """Draft one transaction. Raises Refused for one that can never be done; then nothing of it is drafted."""
        succeeded = all(self._holds(compare) for compare in compares)
        self._write(then if succeeded else otherwise)
        return TxnResult(succeeded, self.revision)

    def end_lease(self, lease: int) -> None:
        """Draft the end of a lease: all its keys go, in one transaction."""
        keys = set(self._index.leases.get(lease, ())) | set(self._changed)
        owned = sorted(key for key in keys if (entry := self.get(key)) is not None and entry.lease == lease)
        self._ended.add(lease)
        self._write([Delete(key) for key in owned])

    def _holds(self, compare: Compare) -> bool:
        entry = self.get(compare.key)
        seen = 0
        if entry is not None:
            seen = {"mod": entry.mod_revision, "create": entry.create_revision, "version": entry.version}[
                compare.target
            ]
        return _OPERATORS[compare.op](seen, compare.value)

    def _write(self, ops: Sequence[Op]) -> None:
        revision = self.revision + 1
        changes: dict[str, Change] = {}
        for op in ops:
            if isinstance(op, Put):
                self._check_lease(op)
        for op in ops:
            previous = self.get(op.key)
            if isinstance(op, Put):
                entry = Entry(
                    op.key,
                    op.value,
                    previous.create_revision if previous else revision,
                    revision,
                    previous.version + 1 if previous else 1,
                    op.lease,
                )
                changes[op.key] = Change(op.key, entry, previous)
            elif previous is not None:
                changes[op.key] = Change(op.key, None, previous)
        if changes:
            self._changed.update((key, change.entry) for key, change in changes.items())
            self.revision = revision
            self.batches.append(Batch(revision, tuple(changes.values())))

    def _check_lease(self, op: Put) -> None:
        if op.lease and (op.lease in self._ended or op.lease not in self._index.leases):
            raise NotFound(f"the lease {op.lease} of {op.key} is gone", hint="ask for a new lease")


def _size(batch: Batch) -> int:
    return sum(len(change.entry.value) for change in batch.changes if change.entry is not None)


def check_request(compares: Sequence[Compare], *branches: Sequence[Op]) -> None:
    """Refuse a transaction that no store takes: too many operations, a key twice in a branch, a value too large."""
    for ops in branches:
        if len(ops) > MAX_OPS or len(compares) > MAX_OPS:
            raise Refused(f"a transaction takes at most {MAX_OPS} operations", code="too-large")
        keys = [op.key for op in ops]
        if len(set(keys)) != len(keys):
            raise Refused("a transaction may write each key only once", code="usage")
        for op in ops:
            if isinstance(op, Put) and len(op.value) > MAX_VALUE:
                problem = Problem(op.key, f"{len(op.value)} bytes are too many", f"at most {MAX_VALUE}")
                raise Refused(str(problem), code="too-large", field=op.key)


def filtered(batches: Sequence[Batch], prefix: str) -> Iterator[Batch]:
    """The batches as a watcher of ``prefix`` sees them; those that do not touch it are left out."""
    for batch in batches:
        changes = tuple(change for change in batch.changes if change.key.startswith(prefix))
        if changes:
            yield batch if len(changes) == len(batch.changes) else Batch(batch.revision, changes)
