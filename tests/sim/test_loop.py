"""Virtual time: it passes only while everybody waits, it never hangs, and nothing may escape it."""

from __future__ import annotations

import asyncio
import time

import pytest

from corral.errors import Bug
from corral.sim.loop import Deadlock, SimClock, VirtualLoop, simulate
from corral.sim.process import Process, track_tasks


def test_an_hour_passes_at_once() -> None:
    async def main(loop: VirtualLoop) -> float:
        await SimClock(loop).sleep(3600)
        return loop.time()

    began = time.monotonic()
    assert simulate(main) == pytest.approx(3600)
    assert time.monotonic() - began < 1


def test_sleepers_wake_in_order_of_their_time() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        woken: list[float] = []

        async def sleeper(seconds: float) -> None:
            await asyncio.sleep(seconds)
            woken.append(seconds)

        await asyncio.gather(*(sleeper(s) for s in (5.0, 0.1, 60.0, 2.5)))
        return woken

    assert simulate(main) == [0.1, 2.5, 5.0, 60.0]


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def main(loop: VirtualLoop) -> None:
        await asyncio.sleep(7)
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match=r"at 7\.000 s"):
        simulate(main)


def test_a_busy_loop_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.sim.loop.MOST_ROUNDS", 1000)

    async def main(loop: VirtualLoop) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Bug, match="spins"):
        simulate(main)


def test_threads_and_sockets_are_refused() -> None:
    async def thread(loop: VirtualLoop) -> None:
        await asyncio.to_thread(time.sleep, 0)

    async def server(loop: VirtualLoop) -> None:
        await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)

    with pytest.raises(Bug, match="threads"):
        simulate(thread)
    with pytest.raises(Bug, match="socket"):
        simulate(server)


def test_a_crash_ends_every_task_of_a_process_and_no_other() -> None:
    async def main(loop: VirtualLoop) -> tuple[list[str], list[str]]:
        track_tasks(loop)
        ended: list[str] = []
        reached: list[str] = []

        async def live(name: str, process: Process | None) -> None:
            try:
                await asyncio.sleep(10)
                reached.append(name)
            finally:
                ended.append(name)
                if process is not None:
                    await asyncio.sleep(0.1)
                    reached.append(f"{name} after its death")

        process = Process("victim")

        async def parent() -> None:
            child = asyncio.create_task(live("child", process))
            await live("parent", process)
            await child

        process.start(parent, "parent")
        other = asyncio.create_task(live("bystander", None))
        await asyncio.sleep(1)
        process.crash()
        await process.buried()
        with pytest.raises(asyncio.CancelledError):
            process.check()
        assert sorted(ended) == ["child", "parent"]
        await other
        return ended, reached

    assert simulate(main)[1] == ["bystander"]


def test_a_task_that_cannot_be_ended_is_named() -> None:
    async def main(loop: VirtualLoop) -> None:
        track_tasks(loop)
        process, stop = Process("victim"), asyncio.Event()

        async def stubborn() -> None:
            while not stop.is_set():
                try:
                    await asyncio.sleep(1)
                except asyncio.CancelledError:
                    continue

        task = process.start(stubborn, "stubborn")
        await asyncio.sleep(0)
        process.crash()
        try:
            await process.buried()
        finally:
            stop.set()
            await task

    with pytest.raises(Bug, match="victim/stubborn"):
        simulate(main)
