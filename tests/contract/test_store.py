"""The store's laws, over every implementation: each is driven at random next to a model that is plainly right."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from corral.errors import CorralError, NotFound, Unavailable, WatchLost
from corral.runtime import Runtime, SeededRandom
from corral.store.local import LocalStore
from corral.store.memory import MemoryStore
from corral.store.protocol import Batch, Compare, Delete, Put
from corral.store.sqlite import SqliteStore
from tests.contract.store_model import HandClock, ModelStore

HISTORY = 3
"""Batches promised to a watcher; no group of transactions here is larger, so that no watcher may be lost by one."""
KEYS = ["/a/1", "/a/2", "/a/3", "/b/1", "/b/2", "/c"]
PREFIXES = ["/", "/a/", "/b/", "/c", "/nothing"]

Opener = Callable[[Path, Runtime], Coroutine[Any, Any, LocalStore]]


async def open_memory(_: Path, rt: Runtime) -> LocalStore:
    return MemoryStore(rt, history=HISTORY)


async def open_sqlite(directory: Path, rt: Runtime) -> LocalStore:
    return await SqliteStore(directory / "store.db", rt, history=HISTORY).open()


OPENERS = {"memory": open_memory, "sqlite": open_sqlite}

compares = st.lists(
    st.tuples(
        st.sampled_from(KEYS),
        st.sampled_from(["mod", "create", "version"]),
        st.sampled_from(["==", "!=", "<", ">"]),
        st.integers(-2, 2),
    ),
    max_size=3,
)
ops = st.lists(
    st.tuples(st.sampled_from(KEYS), st.one_of(st.none(), st.binary(max_size=4)), st.integers(0, 3)),
    max_size=4,
    unique_by=lambda op: op[0],
)


class StoreMachine(RuleBasedStateMachine):
    """Random transactions, watches, leases, passing time and reopening; after each step store and model agree."""

    opener: Opener
    durable: bool

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="corral-store-"))
        self.loop = asyncio.new_event_loop()
        self.clock = HandClock()
        self.rt = Runtime(clock=self.clock, random=SeededRandom(7))
        self.store = self.run(type(self).opener(self.directory, self.rt))
        self.model = ModelStore()
        self.watches: list[tuple[str, int, list[Batch], asyncio.Task[str]]] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    def teardown(self) -> None:
        self.settle()
        self.run(self.store.close())
        for _, _, _, task in self.watches:
            assert self.run(task) == "closed"
        assert not asyncio.all_tasks(self.loop), "a closed store leaves nothing running"
        self.loop.close()
        shutil.rmtree(self.directory)

    def settle(self) -> None:
        """Let watchers and the lease reaper catch up, then compare what each watcher saw."""

        async def caught_up() -> None:
            for _ in range(2000):
                revision = (await self.store.range("/")).revision
                late = [
                    1
                    for prefix, start, seen, task in self.watches
                    if not task.done() and len(seen) < len(self.model.watch(prefix, start))
                ]
                if revision == self.model.revision and not late:
                    return
                await asyncio.sleep(0 if type(self).opener is open_memory else 0.001)

        self.run(caught_up())
        for prefix, start, seen, task in self.watches:
            assert seen == self.model.watch(prefix, start), f"watch {prefix} from {start}: {task}"

    def make_txn(self, wanted: tuple[Any, Any, Any]) -> tuple[list[Compare], list[Any], list[Any]]:
        lease_ids = [0, *self.model.leases, 99]

        def convert(op: tuple[str, bytes | None, int]) -> Put | Delete:
            key, value, lease = op
            return Delete(key) if value is None else Put(key, value, lease_ids[lease % len(lease_ids)] if lease else 0)

        conditions = []
        for key, target, op, offset in wanted[0]:
            entry = self.model.entries.get(key)
            base = 0
            if entry is not None:
                base = {"mod": entry.mod_revision, "create": entry.create_revision, "version": entry.version}[target]
            conditions.append(Compare(key, target, op, max(0, base + offset)))
        return conditions, [convert(op) for op in wanted[1]], [convert(op) for op in wanted[2]]

    @initialize()
    def begin_watching_everything(self) -> None:
        self.open_watch("/", 0)

    @rule(group=st.lists(st.tuples(compares, ops, ops), min_size=1, max_size=HISTORY))
    def txns_at_once(self, group: list[tuple[Any, Any, Any]]) -> None:
        requests = [self.make_txn(wanted) for wanted in group]
        expected = [self.model.txn(*request) for request in requests]

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(self.store.txn(*request) for request in requests), return_exceptions=True)

        for result, wanted in zip(self.run(all_at_once()), expected, strict=True):
            assert isinstance(result, NotFound) if wanted is None else result == wanted
        self.settle()

    @rule(prefix=st.sampled_from(PREFIXES), back=st.integers(-2, HISTORY * 3))
    def open_watch(self, prefix: str, back: int) -> None:
        if len([1 for _, _, _, task in self.watches if not task.done()]) >= 4:
            return
        start = self.model.revision - back
        seen: list[Batch] = []

        async def follow() -> str:
            try:
                async with aclosing(self.store.watch(prefix, start)) as batches:
                    async for batch in batches:
                        seen.append(batch)
            except WatchLost:
                return "lost"
            except Unavailable:
                return "closed"
            return "ended"

        task = self.loop.create_task(follow())
        self.run(asyncio.sleep(0))
        self.run(asyncio.sleep(0))
        if task.done():
            assert task.result() == "lost"
            assert start <= self.model.revision - HISTORY, "lost, although the promised history holds it"
            assert not seen, "a watch that cannot be complete must not begin"
        else:
            self.watches.append((prefix, max(start, 0), seen, task))

    @rule(index=st.integers(0, 3))
    @precondition(lambda self: self.watches)
    def stop_watch(self, index: int) -> None:
        self.settle()
        self.drop_watch(index % len(self.watches))

    def drop_watch(self, index: int) -> None:
        _, _, _, task = self.watches.pop(index)
        task.cancel()
        self.run(asyncio.wait([task]))

    @rule(ttl=st.sampled_from([1.0, 3.0, 10.0]))
    def grant(self, ttl: float) -> None:
        lease = self.run(self.store.grant(ttl))
        assert lease not in self.model.leases
        self.model.leases[lease] = (self.clock.time + ttl, ttl)

    @rule(index=st.integers(0, 3))
    def keepalive(self, index: int) -> None:
        assert self.run(self.store.keepalive(99)) is False
        if self.model.leases:
            lease = list(self.model.leases)[index % len(self.model.leases)]
            ttl = self.model.leases[lease][1]
            assert self.run(self.store.keepalive(lease)) is True
            self.model.leases[lease] = (self.clock.time + ttl, ttl)

    @rule(index=st.integers(0, 3))
    @precondition(lambda self: self.model.leases)
    def revoke(self, index: int) -> None:
        lease = list(self.model.leases)[index % len(self.model.leases)]
        self.run(self.store.revoke(lease))
        self.model.end_lease(lease)

    @rule(seconds=st.sampled_from([0.5, 2.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.expire(self.clock.time)
        self.settle()

    @rule()
    @precondition(lambda self: type(self).durable)
    def reopen(self) -> None:
        self.settle()
        self.run(self.store.close())
        for _, _, _, task in self.watches:
            assert self.run(task) == "closed"
        self.watches.clear()
        self.store = self.run(type(self).opener(self.directory, self.rt))
        for lease, (_, ttl) in self.model.leases.items():
            self.model.leases[lease] = (self.clock.time + ttl, ttl)
        for back in range(3 * HISTORY):  # what is told of the past is the same as before it was closed
            self.open_watch("/", back)
            self.settle()
            if back and self.watches:
                self.drop_watch(0)

    @rule(prefix=st.sampled_from(PREFIXES), start=st.sampled_from(["", *KEYS]), limit=st.integers(0, 3))
    def read_range(self, prefix: str, start: str, limit: int) -> None:
        found = self.run(self.store.range(prefix, start=start, limit=limit))
        wanted = sorted(e for e in self.model.entries.values() if e.key.startswith(prefix) and e.key >= start)
        assert found.entries == tuple(wanted[:limit] if limit else wanted)

    @invariant()
    def the_same_state(self) -> None:
        snapshot = self.run(self.store.range("/"))
        assert snapshot.revision == self.model.revision
        assert snapshot.entries == tuple(sorted(self.model.entries.values()))
        for key in KEYS:
            assert self.run(self.store.get(key)) == self.model.entries.get(key)


@pytest.mark.parametrize("name", list(OPENERS))
def test_every_store_agrees_with_the_model(name: str) -> None:
    machine = type(
        f"{name}Machine", (StoreMachine,), {"opener": staticmethod(OPENERS[name]), "durable": name == "sqlite"}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60 if name == "memory" else 30,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(params=list(OPENERS))
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LocalStore]:
    opened = await OPENERS[request.param](tmp_path, Runtime())
    yield opened
    await opened.close()


async def test_a_watcher_sees_a_transaction_whole(store: LocalStore) -> None:
    async with aclosing(store.watch("/", 1)) as batches:
        await store.txn([], [Put("/a", b"1"), Put("/b", b"2")])
        batch = await anext(batches)
    assert [change.key for change in batch.changes] == ["/a", "/b"]


async def test_a_slow_watcher_is_told_that_it_missed_something(store: LocalStore) -> None:
    async with aclosing(store.watch("/", 1)) as batches:
        await store.txn([], [Put("/a", b"0")])
        await anext(batches)
        for number in range(HISTORY * 4):
            await store.txn([], [Put("/a", b"%d" % number)])
        with pytest.raises(WatchLost):
            await anext(batches)


async def test_one_of_many_swaps_of_one_revision_wins(store: LocalStore) -> None:
    revision = (await store.txn([], [Put("/a", b"0")])).revision
    swaps = [store.txn([Compare("/a", "mod", "==", revision)], [Put("/a", b"%d" % n)]) for n in range(20)]
    assert [result.succeeded for result in await asyncio.gather(*swaps)].count(True) == 1


async def test_a_transaction_that_writes_a_key_twice_is_refused(store: LocalStore) -> None:
    with pytest.raises(CorralError, match="only once"):
        await store.txn([], [Put("/a", b"1"), Delete("/a")])
    assert (await store.range("/")).entries == ()


async def test_a_value_that_is_too_large_is_refused(store: LocalStore) -> None:
    with pytest.raises(CorralError) as caught:
        await store.txn([], [Put("/a", b"x" * (3 << 20))])
    assert caught.value.code == "too-large"


async def test_nothing_is_served_once_closed(store: LocalStore) -> None:
    await store.close()
    for work in (store.get("/a"), store.range("/"), store.txn([], []), store.grant(1), anext(store.watch("/", 1))):
        with pytest.raises(Unavailable):
            await work
