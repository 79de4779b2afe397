"""A store so simple that it is plainly right: what every real one is compared against. And a clock moved by hand."""

from __future__ import annotations

import asyncio
import operator

from corral.store.protocol import Batch, Change, Compare, Delete, Entry, Op, Put, TxnResult

OPERATORS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt}


class HandClock:
    """Time stands still until :meth:`advance`."""

    def __init__(self) -> None:
        self.time = 1000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.time + seconds, future))
        await future

    def advance(self, seconds: float) -> None:
        self.time += seconds
        due = [future for at, future in self._sleepers if at <= self.time]
        self._sleepers = [(at, future) for at, future in self._sleepers if at > self.time]
        for future in due:
            if not future.done():
                future.set_result(None)


class ModelStore:
    """Laws of corral.store.protocol, written down with no thought of speed."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.revision = 0
        self.batches: list[Batch] = []
        self.leases: dict[int, tuple[float, float]] = {}  # id → (deadline, ttl)

    def txn(self, compares: list[Compare], then: list[Op], otherwise: list[Op]) -> TxnResult | None:
        """None: refused, because a lease does not exist."""
        succeeded = all(OPERATORS[c.op](self._value(c), c.value) for c in compares)
        ops = then if succeeded else otherwise
        if any(isinstance(op, Put) and op.lease and op.lease not in self.leases for op in ops):
            return None
        self._write(ops)
        return TxnResult(succeeded, self.revision)

    def end_lease(self, lease: int) -> None:
        del self.leases[lease]
        self._write([Delete(e.key) for e in sorted(self.entries.values()) if e.lease == lease])

    def expire(self, now: float) -> None:
        for _, lease in sorted((at, lease) for lease, (at, _) in self.leases.items() if at <= now):
            self.end_lease(lease)

    def watch(self, prefix: str, start: int) -> list[Batch]:
        seen = [
            Batch(b.revision, tuple(c for c in b.changes if c.key.startswith(prefix)))
            for b in self.batches
            if b.revision >= start
        ]
        return [batch for batch in seen if batch.changes]

    def _value(self, compare: Compare) -> int:
        entry = self.entries.get(compare.key)
        if entry is None:
            return 0
        return {"mod": entry.mod_revision, "create": entry.create_revision, "version": entry.version}[compare.target]

    def _write(self, ops: list[Op]) -> None:
        changes: list[Change] = []
        for op in ops:
            old = self.entries.get(op.key)
            if isinstance(op, Put):
                created, version = (old.create_revision, old.version + 1) if old else (self.revision + 1, 1)
                new = self.entries[op.key] = Entry(op.key, op.value, created, self.revision + 1, version, op.lease)
                changes.append(Change(op.key, new, old))
            elif old is not None:
                del self.entries[op.key]
                changes.append(Change(op.key, None, old))
        if changes:
            self.revision += 1
            self.batches.append(Batch(self.revision, tuple(changes)))
