"""The reference store: everything in memory, deterministic, nothing durable. The simulator runs on it."""

from __future__ import annotations

from collections.abc import Sequence

from corral.store.index import Draft, check_request
from corral.store.local import HISTORY_SIZE, LocalStore
from corral.store.protocol import Compare, Op, TxnResult


class MemoryStore(LocalStore):
    """``MemoryStore(rt, history=N)``: keeps at least ``history`` batches for watchers, as long as they are small."""

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        self._check_open()
        check_request(compares, then, otherwise)
        draft = Draft(self._index)
        result = draft.txn(compares, then, otherwise)
        self._publish(draft)
        return result

    async def _record_lease(self, lease: int, ttl_s: float) -> None:
        return None

    async def _end_lease(self, lease: int) -> None:
        draft = Draft(self._index)
        draft.end_lease(lease)
        self._publish(draft)
        self._index.leases.pop(lease, None)

    def _publish(self, draft: Draft) -> None:
        for batch in draft.batches:
            self._index.apply(batch)
        self._index.forget(self._index.surplus(self._history, HISTORY_SIZE))
        if draft.batches:
            self._announce()
