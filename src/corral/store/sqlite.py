"""The durable store of one machine: an SQLite log, written in groups, read from memory.

Transactions that arrive while a group is being written wait and form the next group, so however many there are, each
fsync acknowledges all that came before it. A group is drafted against the index, made durable in the writer thread,
and only then applied, announced and acknowledged. The file itself is :mod:`corral.store.logfile`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from corral.errors import Bug, CorralError, Unavailable, Unknown
from corral.runtime import Runtime
from corral.store.index import Draft, check_request
from corral.store.local import HISTORY, HISTORY_SIZE, LocalStore
from corral.store.logfile import LogFile
from corral.store.protocol import Compare, Op, TxnResult

R = TypeVar("R")

GROUP = 512
"""Transactions in one group: bounds how long the first of them waits for the last."""

PATIENCE_S = 30.0
"""How long a caller waits for the disk before it is told that the outcome is unknown."""


class _Request(NamedTuple):
    draft: Callable[[Draft], TxnResult]
    answer: asyncio.Future[TxnResult]
    ends_lease: int = 0


class SqliteStore(LocalStore):
    """``await SqliteStore(path, rt).open()``. One process has a file open at a time."""

    def __init__(self, path: Path, rt: Runtime, history: int = HISTORY) -> None:
        super().__init__(rt, history)
        self.path = path
        self._log = LogFile(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._waiting: list[_Request] = []
        self._writer: asyncio.Task[None] | None = None
        self._broken: CorralError | None = None

    async def open(self) -> SqliteStore:
        """Open or create the file and read it. Raises Refused ``in-use``, or CorralError saying what is damaged."""
        try:
            await self._in_thread(self._log.open)
            leases = await self._in_thread(lambda: self._log.load(self._index))
        except BaseException:
            await self._in_thread(self._log.close)
            self._thread.shutdown()
            raise
        for lease, ttl_s in leases.items():
            # Nobody could prolong them while the store was closed: each has its whole time again.
            self._start_lease(lease, ttl_s)
        return self

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        self._check_open()
        check_request(compares, then, otherwise)
        return await self._submit(lambda draft: draft.txn(compares, then, otherwise))

    async def close(self) -> None:
        """Finish what was submitted, checkpoint and unlock."""
        if self._closed:
            return
        await super().close()
        if self._writer is not None:
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._in_thread(self._log.close)
        self._thread.shutdown()

    async def _record_lease(self, lease: int, ttl_s: float) -> None:
        await self._in_thread(lambda: self._log.add_lease(lease, ttl_s))

    async def _end_lease(self, lease: int) -> None:
        def draft(group: Draft) -> TxnResult:
            group.end_lease(lease)
            return TxnResult(True, group.revision)

        await self._submit(draft, lease)

    async def _submit(self, draft: Callable[[Draft], TxnResult], ends_lease: int = 0) -> TxnResult:
        if self._broken is not None:
            raise Unavailable(f"the store stopped: {self._broken.message}", hint=self._broken.hint)
        answer: asyncio.Future[TxnResult] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(draft, answer, ends_lease))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write(), name="store-writer")
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await answer
        except TimeoutError as error:
            raise Unknown(
                f"{self.path} did not take a write within {PATIENCE_S:g} s", hint="look at the disk"
            ) from error

    async def _write(self) -> None:
        """Write group after group until nothing waits."""
        while self._waiting:
            group, self._waiting = self._waiting[:GROUP], self._waiting[GROUP:]
            await self._write_group([request for request in group if not request.answer.done()])

    async def _write_group(self, group: list[_Request]) -> None:
        draft = Draft(self._index)
        answers: list[tuple[_Request, TxnResult]] = []
        for request in group:
            try:
                answers.append((request, request.draft(draft)))
            except CorralError as error:
                request.answer.set_exception(error)
        ended = [request.ends_lease for request, _ in answers if request.ends_lease]
        if draft.batches or ended:
            dropped = self._index.surplus(self._history, HISTORY_SIZE)
            try:
                await self._in_thread(lambda: self._log.append(draft.batches, dropped, ended))
            except CorralError as error:
                self._refuse(answers, error)
                return
            self._index.forget(dropped)
        for batch in draft.batches:
            self._index.apply(batch)
        for lease in ended:
            self._index.leases.pop(lease, None)
        if draft.batches:
            self._announce()
        for request, result in answers:
            if not request.answer.done():
                request.answer.set_result(result)

    def _refuse(self, answers: list[tuple[_Request, TxnResult]], error: CorralError) -> None:
        """A group could not be written. After an unknown outcome nothing more is: memory and file may differ."""
        if not isinstance(error, Unavailable):
            self._broken = error
            waiting, self._waiting = self._waiting, []
            for request in waiting:
                if not request.answer.done():
                    request.answer.set_exception(Unavailable(f"the store stopped: {error.message}", hint=error.hint))
        for request, _ in answers:
            if not request.answer.done():
                request.answer.set_exception(error)

    async def _in_thread(self, work: Callable[[], R]) -> R:
        """Run in the one thread that touches the file. Whatever is no CorralError by then is a bug of ours."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (CorralError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise Bug(f"the store's writer failed: {error!r}") from error
