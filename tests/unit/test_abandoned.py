"""Ephemeral VMs live while somebody holds them, and no longer. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from corral.controllers.abandoned import UNHELD_S, Abandoned
from corral.errors import NotFound
from corral.model import Vm
from corral.store.holds import EVERY_S, LEASE_S, PREFIX, Holds
from tests.unit.stage import Stage, on_stage, vm_id


@asynccontextmanager
async def running(*loops: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(loop()) for loop in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def lives(stage: Stage) -> bool:
    try:
        return (await stage.vm()).meta.deleted is None
    except NotFound:
        return False


def test_a_vm_that_nobody_comes_for_is_deleted_and_an_event_says_why() -> None:
    async def test(stage: Stage) -> None:
        async with running(Abandoned(stage.objects, stage.rt).run):
            await stage.launch(ephemeral=True)
            await asyncio.sleep(UNHELD_S - 1)
            assert await lives(stage)
            await stage.gone(limit=UNHELD_S + 5)
            assert "Abandoned" in await stage.events()
            assert stage.world.machines == {}

    on_stage(test)


def test_two_that_hold_at_once_hang_on_one_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(stage: Stage) -> None:
        grant = stage.store.grant

        async def slow(ttl: float) -> int:
            await asyncio.sleep(0.01)  # as one that writes to a disk
            return await grant(ttl)

        monkeypatch.setattr(stage.store, "grant", slow)
        holds = Holds(stage.store, stage.rt)
        async with running(Abandoned(stage.objects, stage.rt).run, holds.run):
            await stage.launch("one", ephemeral=True)
            await stage.launch("two", ephemeral=True)
            await asyncio.gather(holds.take(vm_id("one")), holds.take(vm_id("two")))
            await asyncio.sleep(2 * LEASE_S + 2 * UNHELD_S)
            names = {vm.meta.name for vm in (await stage.objects.list(Vm)).items if vm.meta.deleted is None}
            assert names == {"one", "two"}

    on_stage(test)


def test_a_held_vm_lives_and_ends_soon_after_its_last_holder() -> None:
    async def test(stage: Stage) -> None:
        holds = Holds(stage.store, stage.rt)
        async with running(Abandoned(stage.objects, stage.rt).run, holds.run):
            await stage.launch(ephemeral=True)
            one, two = await holds.take(vm_id()), await holds.take(vm_id())
            await asyncio.sleep(10 * LEASE_S)
            assert await lives(stage)
            holds.release(one)
            await asyncio.sleep(10 * UNHELD_S)
            assert await lives(stage)
            holds.release(two)
            await asyncio.sleep(UNHELD_S - 1)
            assert await lives(stage)
            await stage.gone(limit=UNHELD_S + 5)
            assert (await stage.store.range(PREFIX)).entries == ()

    on_stage(test)


def test_somebody_who_connects_again_in_time_keeps_it() -> None:
    async def test(stage: Stage) -> None:
        holds = Holds(stage.store, stage.rt)
        async with running(Abandoned(stage.objects, stage.rt).run, holds.run):
            await stage.launch(ephemeral=True)
            for _ in range(5):
                key = await holds.take(vm_id())
                await asyncio.sleep(1)
                holds.release(key)
                await asyncio.sleep(UNHELD_S - 1)
            assert await lives(stage)

    on_stage(test)


def test_the_holds_of_a_process_that_dies_run_out() -> None:
    async def test(stage: Stage) -> None:
        holds = Holds(stage.store, stage.rt)
        async with running(Abandoned(stage.objects, stage.rt).run):
            async with running(holds.run):
                await stage.launch(ephemeral=True)
                await holds.take(vm_id())
                await asyncio.sleep(3 * LEASE_S)
            await asyncio.sleep(LEASE_S - EVERY_S - 1)
            assert await lives(stage), "it may come back"
            await stage.gone(limit=EVERY_S + UNHELD_S + 5)

    on_stage(test)


def test_a_process_that_stood_still_for_long_holds_again_what_it_still_holds() -> None:
    async def test(stage: Stage) -> None:
        holds = Holds(stage.store, stage.rt)
        key = await holds.take(vm_id())
        await asyncio.sleep(2 * LEASE_S)
        assert (await stage.store.range(PREFIX)).entries == ()
        async with running(holds.run):
            await asyncio.sleep(1)
            assert [entry.key for entry in (await stage.store.range(PREFIX)).entries] == [key]
            await asyncio.sleep(5 * LEASE_S)
            assert [entry.key for entry in (await stage.store.range(PREFIX)).entries] == [key]

    on_stage(test)


@pytest.mark.parametrize("change", ["ordinary", "made to stay"])
def test_what_is_not_ephemeral_is_nobodys_to_delete(change: str) -> None:
    async def test(stage: Stage) -> None:
        async with running(Abandoned(stage.objects, stage.rt).run):
            await stage.launch(ephemeral=change != "ordinary")
            if change == "made to stay":
                await stage.ask("set", ephemeral=False)
            await asyncio.sleep(10 * (LEASE_S + UNHELD_S))
            assert await lives(stage)

    on_stage(test)


def test_a_controller_that_starts_again_gives_everybody_their_time_again() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch(ephemeral=True)
        for _ in range(5):
            async with running(Abandoned(stage.objects, stage.rt).run):
                await asyncio.sleep(UNHELD_S - 1)
        assert await lives(stage)
        async with running(Abandoned(stage.objects, stage.rt).run):
            await stage.gone(limit=UNHELD_S + 5)

    on_stage(test)
