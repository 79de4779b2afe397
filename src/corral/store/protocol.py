"""The store's contract: what every implementation promises, in etcd's terms.

Laws (tests/contract/test_store.py runs them over every implementation):

- One global revision, rising by one with every transaction that changes something.
- A transaction is atomic: all of ``then`` or all of ``otherwise``, and a watcher sees it whole, in one batch.
- A watcher sees every change of its prefix from its revision on, in order, or its iterator raises
  :class:`~corral.errors.WatchLost`; it is never silently skipped ahead.
- Acknowledged means durable.
- A key whose lease ends is deleted, in one transaction a lease.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple, Protocol


class Entry(NamedTuple):
    """One key as it stands. ``version`` counts the changes since creation, from 1."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Compare(NamedTuple):
    """A condition on one key. ``mod == 0`` (or ``create == 0``) means: the key does not exist."""

    key: str
    target: Literal["mod", "create", "version"]
    op: Literal["==", "!=", "<", ">"]
    value: int


class Put(NamedTuple):
    key: str
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Delete one key (deleting what is not there changes nothing)."""

    key: str


Op = Put | Delete


class TxnResult(NamedTuple):
    """``revision`` is the store's after the transaction; unchanged if nothing was changed."""

    succeeded: bool
    revision: int


class Change(NamedTuple):
    """One change. ``entry`` is None for a deletion; ``previous`` is what was there before, when known."""

    key: str
    entry: Entry | None
    previous: Entry | None


class Batch(NamedTuple):
    """All changes of one transaction under the watched prefix."""

    revision: int
    changes: tuple[Change, ...]


class Snapshot(NamedTuple):
    """Entries in key order, all as of ``revision``."""

    entries: tuple[Entry, ...]
    revision: int


class Store(Protocol):
    """What everything else is built on. Errors: Unavailable (nothing happened), Unknown (cannot tell), WatchLost."""

    async def get(self, key: str) -> Entry | None: ...

    async def range(self, prefix: str, *, start: str = "", limit: int = 0) -> Snapshot:
        """Keys that begin with ``prefix``, from ``start`` (a full key, inclusive), at most ``limit`` (0: all)."""
        ...

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult: ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Batch]:
        """Batches with revision >= ``from_revision``, then live ones, until closed (``aclose``)."""
        ...

    async def grant(self, ttl_s: float) -> int:
        """A new lease id."""
        ...

    async def keepalive(self, lease: int) -> bool:
        """Prolong; False when the lease is gone."""
        ...

    async def revoke(self, lease: int) -> None: ...

    async def close(self) -> None: ...
