"""The balloon governor on a pretended host: pressure takes from the idle, ease gives back, and rest costs nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from corral.engine.fake import FakeEngine, FakeMachine
from corral.model import Host, Memory
from corral.model.effect import effects
from corral.model.shape import to_tree

from .stage import GIB, MIB, Stage, on_stage, vm_id

NAMES = ("a", "b", "c", "d", "e", "f")
SIZE = 256 * MIB
BUDGET = len(NAMES) * (SIZE + 60 * MIB) * 2 // 3


async def host(stage: Stage, **spec: Any) -> None:
    """Change the host's record, as `corral host set` does."""
    await stage.objects.change(
        Host, "host-1", lambda h: msgspec.structs.replace(h, spec=msgspec.structs.replace(h.spec, **spec))
    )
    await asyncio.sleep(0.1)


async def change(stage: Stage, name: str, **memory: Any) -> None:
    """Change a VM's memory, as `corral vm set` does."""
    vm = await stage.vm(name)
    spec = msgspec.structs.replace(vm.spec, memory=msgspec.structs.replace(vm.spec.memory, **memory))
    meta = msgspec.structs.replace(vm.meta, generation=vm.meta.generation + 1)
    await stage.objects.update(msgspec.structs.replace(vm, meta=meta, spec=spec))


async def six(stage: Stage, **reserves: int) -> None:
    """Six VMs with one and a half times the budget; each uses a quarter of its memory."""
    await host(stage, memory_budget=BUDGET, memory_overcommit=1.5)
    for name in NAMES:
        await stage.launch(name, memory=Memory(size=SIZE, reserve=reserves.get(name)))
        await stage.phase("running", name)
    await asyncio.sleep(5)


def machine(stage: Stage, name: str) -> FakeMachine:
    return stage.world.machines[vm_id(name)]


def granted(stage: Stage) -> dict[str, int]:
    return {name: machine(stage, name).granted for name in NAMES}


def test_without_pressure_no_balloon_moves_and_no_guest_is_asked() -> None:
    async def test(stage: Stage) -> None:
        await six(stage)
        await asyncio.sleep(30)
        assert set(granted(stage).values()) == {SIZE}
        assert {machine(stage, name).poll_s for name in NAMES} == {0}
        assert not {"MemoryPressure", "MemoryShort"} & set(await stage.events())

    on_stage(test)


def test_idle_guests_pay_first_reservations_hold_and_all_is_given_back() -> None:
    async def test(stage: Stage) -> None:
        await six(stage, f=SIZE)
        for name in ("a", "b", "c"):
            stage.world.need(vm_id(name), 220 * MIB)
        await asyncio.sleep(10)
        now = granted(stage)
        assert all(now[name] >= 220 * MIB + 16 * MIB for name in ("a", "b", "c")), "who uses memory keeps it"
        assert all(64 * MIB + 16 * MIB <= now[name] < SIZE for name in ("d", "e")), "who does not, gives back the rest"
        assert now["f"] == SIZE, "what is reserved is not touched"
        usage = {vm.name: vm.memory for vm in (await stage.agent.meter.usage()).vms}
        assert (usage["d"].granted, usage["d"].guest_used) == (now["d"], 64 * MIB)
        for name in ("a", "b", "c"):
            stage.world.need(vm_id(name), 64 * MIB)
        await asyncio.sleep(10)
        assert set(granted(stage).values()) == {SIZE}
        await asyncio.sleep(5)
        assert {machine(stage, name).poll_s for name in NAMES} == {0}, "nobody is asked any more"
        told = [reason for reason in await stage.events() if reason.startswith("Memory")]
        assert told[0] == "MemoryPressure"
        assert told[-1] == "MemoryRelaxed"

    on_stage(test)


def test_a_guest_that_comes_back_to_work_gets_its_memory_again_from_the_idle() -> None:
    async def test(stage: Stage) -> None:
        await six(stage)
        for name in ("a", "b", "c"):
            stage.world.need(vm_id(name), 200 * MIB)
        await asyncio.sleep(10)
        squeezed = machine(stage, "d").granted
        stage.world.need(vm_id("a"), 64 * MIB)
        stage.world.need(vm_id("d"), squeezed)
        await asyncio.sleep(10)
        assert machine(stage, "d").granted > squeezed
        assert machine(stage, "a").granted >= 80 * MIB

    on_stage(test)


def test_what_cannot_be_had_is_told() -> None:
    async def test(stage: Stage) -> None:
        await six(stage)
        for name in NAMES:
            stage.world.need(vm_id(name), 240 * MIB)
        await asyncio.sleep(10)
        assert all(machine(stage, name).granted >= 240 * MIB for name in NAMES)
        assert "MemoryShort" in await stage.events()

    on_stage(test)


def test_a_silent_guest_or_hypervisor_is_left_alone_and_holds_up_nobody() -> None:
    async def test(stage: Stage) -> None:
        await six(stage)
        stage.world.deafen(vm_id("d"))
        stage.world.hang(vm_id("e"))
        for name in ("a", "b", "c"):
            stage.world.need(vm_id(name), 220 * MIB)
        await asyncio.sleep(12)
        now = granted(stage)
        assert (now["d"], now["e"]) == (SIZE, SIZE)
        assert now["f"] < SIZE

    on_stage(test)


def test_less_memory_takes_effect_at_once_and_more_up_to_what_it_was_started_with() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("web", memory=Memory(size=512 * MIB))
        vm = await stage.phase("running")
        assert vm.status.memory == 512 * MIB
        await asyncio.sleep(3)
        await change(stage, "web", size=300 * MIB)
        await asyncio.sleep(3)
        assert machine(stage, "web").granted == 300 * MIB
        await change(stage, "web", size=512 * MIB)
        await asyncio.sleep(3)
        assert machine(stage, "web").granted == 512 * MIB
        await change(stage, "web", size=GIB)
        await asyncio.sleep(3)
        assert machine(stage, "web").granted == 512 * MIB
        await stage.done(await stage.ask("restart"))
        assert (await stage.vm()).status.memory == GIB

    on_stage(test)


def test_a_wish_taken_back_before_the_guest_followed_leaves_nothing_behind() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("web", memory=Memory(size=512 * MIB))
        await stage.phase("running")
        await change(stage, "web", size=256 * MIB)
        await stage.until("moved", lambda _vm: machine(stage, "web").granted < 512 * MIB)
        machine(stage, "web").granted = 512 * MIB  # as of a guest that has not begun yet
        await change(stage, "web", size=512 * MIB)
        await asyncio.sleep(10)
        assert machine(stage, "web").granted == 512 * MIB
        assert machine(stage, "web").poll_s == 0, "nobody waits any more for what was asked before"

    on_stage(test)


def test_a_guest_is_never_made_smaller_than_what_it_uses() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("web", memory=Memory(size=512 * MIB))
        await stage.phase("running")
        stage.world.need(vm_id("web"), 400 * MIB)
        await change(stage, "web", size=128 * MIB)
        await asyncio.sleep(10)
        assert machine(stage, "web").granted == 416 * MIB, "what it uses, and a margin"
        stage.world.need(vm_id("web"), 64 * MIB)
        await asyncio.sleep(5)
        assert machine(stage, "web").granted == 128 * MIB

    on_stage(test)


def test_the_next_daemon_finds_a_balloon_and_goes_on() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("web", memory=Memory(size=512 * MIB))
        await stage.phase("running")
        stage.points.died = asyncio.Event()
        stage.points.die_at = "memory.ballooned"
        await change(stage, "web", size=256 * MIB)
        await stage.points.died.wait()
        await stage.stop()
        await change(stage, "web", size=512 * MIB)
        assert machine(stage, "web").granted < 512 * MIB
        await stage.start()
        await asyncio.sleep(10)
        assert machine(stage, "web").granted == 512 * MIB
        assert machine(stage, "web").poll_s == 0

    on_stage(test)


def test_the_host_itself_short_of_memory_takes_back_only_what_is_not_reserved() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("soft", memory=Memory(size=512 * MIB, reserve=128 * MIB))
        await stage.launch("firm", memory=Memory(size=512 * MIB))
        await stage.phase("running", "soft")
        await stage.phase("running", "firm")
        stage.facts = stage.facts._replace(memory_available=100 * MIB)
        await asyncio.sleep(10)
        assert machine(stage, "soft").granted == 160 * MIB
        assert machine(stage, "firm").granted == 512 * MIB, "nothing of it is anybody else's without being said"
        stage.facts = stage.facts._replace(memory_available=8 * GIB)
        await asyncio.sleep(10)
        assert machine(stage, "soft").granted == 512 * MIB

    on_stage(test)


def test_when_a_change_of_memory_takes_effect() -> None:
    def effect(before: int, after: int, memory: int | None, runs: bool = True) -> str:
        specs = [{"memory": to_tree(Memory(size=size * MIB))} for size in (before, after)]
        (only,) = effects(*specs, runs=runs, memory=None if memory is None else memory * MIB)
        return only.effect

    assert effect(512, 256, 512) == "live"
    assert effect(256, 512, 512) == "live"
    assert effect(512, 768, 512) == "restart"
    assert effect(512, 256, None) == "restart", "of a process whose hardware nobody knows nothing is promised"
    assert effect(512, 768, None, runs=False) == "now"


def test_the_pretended_engine_is_the_one_that_is_asked() -> None:
    """The tests above would pass on a governor that did nothing if the stage did not follow balloons."""

    async def test(stage: Stage) -> None:
        await stage.launch("web", memory=Memory(size=512 * MIB))
        await stage.phase("running")
        assert isinstance(stage.agent.engine, FakeEngine)
        await stage.agent.engine.balloon(vm_id("web"), 200 * MIB)
        assert machine(stage, "web").granted == 200 * MIB

    on_stage(test)
