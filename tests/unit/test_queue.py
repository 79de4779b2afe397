"""The keyed queue: one worker a key, nothing forgotten, one key wakes one worker."""

from __future__ import annotations

import asyncio

import pytest

from corral.runtime import KeyedQueue
from corral.sim.loop import SimClock, VirtualLoop, simulate


def ignore(key: str, error: Exception) -> None:
    """A handler's failure that the test expects."""


def test_a_key_is_handled_by_one_worker_at_a_time_and_once_more_if_added_meanwhile() -> None:
    async def main(loop: VirtualLoop) -> list[tuple[str, float]]:
        begun: list[tuple[str, float]] = []
        busy: set[str] = set()

        async def handle(key: str) -> None:
            assert key not in busy
            busy.add(key)
            begun.append((key, loop.time()))
            await asyncio.sleep(1)
            busy.discard(key)

        queue = KeyedQueue(SimClock(loop), handle, workers=4, on_error=ignore)
        runner = loop.create_task(queue.run())
        queue.add("a")
        queue.add("b")
        await asyncio.sleep(0.5)
        queue.add("a")
        queue.add("a")
        await asyncio.sleep(5)
        assert queue.idle()
        runner.cancel()
        await asyncio.wait([runner])
        return begun

    begun = simulate(main)
    assert [key for key, _ in begun] == ["a", "b", "a"]
    assert [at for _, at in begun] == pytest.approx([0, 0, 1])


def test_a_failing_key_comes_again_later_and_later_and_stops_no_other() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        tried: list[float] = []

        async def handle(key: str) -> None:
            if key == "bad":
                tried.append(loop.time())
                raise ValueError(key)

        queue = KeyedQueue(SimClock(loop), handle, workers=1, on_error=ignore, retry=(1.0, 4.0))
        runner = loop.create_task(queue.run())
        queue.add("bad")
        queue.add("good")
        await asyncio.sleep(12)
        runner.cancel()
        await asyncio.wait([runner])
        return tried

    assert simulate(main) == pytest.approx([0, 1, 3, 7, 11])


def test_one_key_wakes_one_worker() -> None:
    async def main(loop: VirtualLoop) -> int:
        async def handle(key: str) -> None:
            return None

        queue = KeyedQueue(SimClock(loop), handle, workers=64, on_error=ignore)
        runner = loop.create_task(queue.run())
        await asyncio.sleep(1)
        woken = 0
        wait = queue._woken

        async def counted() -> None:
            nonlocal woken
            woken += 1
            await wait()

        queue._woken = counted  # type: ignore[method-assign]
        for number in range(10):
            queue.add(str(number))
            await asyncio.sleep(0.1)
        runner.cancel()
        await asyncio.wait([runner])
        return woken

    assert simulate(main) == 10, "each worker goes back to sleep once, after its one key"


def test_a_queue_that_was_stopped_can_run_again() -> None:
    async def main(loop: VirtualLoop) -> list[str]:
        handled: list[str] = []

        async def handle(key: str) -> None:
            handled.append(key)

        queue = KeyedQueue(SimClock(loop), handle, workers=3, on_error=ignore)
        for key in ("first", "second"):
            runner = loop.create_task(queue.run())
            await asyncio.sleep(1)
            queue.add(key)
            await asyncio.sleep(1)
            runner.cancel()
            queue.add(f"late {key}")  # its workers are ending: it waits for the next run
            await asyncio.wait([runner])
        runner = loop.create_task(queue.run())
        await asyncio.sleep(1)
        runner.cancel()
        await asyncio.wait([runner])
        return handled

    assert simulate(main) == ["first", "late first", "second", "late second"]
