"""Forks made ahead, on a pretended host with the real API: made, given, withdrawn, pressed out; killed in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corral.agent.settings import Settings
from corral.api.service import Service
from corral.engine.fake import FakeEngine
from corral.engine.protocol import State
from corral.errors import NotFound, Unavailable
from corral.model import Memory, Vm
from corral.model.vm import start_of
from corral.runtime.points import WARM_POINTS
from corral.store.ready import Offer, ReadyBook
from corral.units import GIB, MIB
from tests.unit.stage import FakeFacts, Stage, on_stage
from tests.unit.test_templates import order, retire, template_of

WARM = Settings(warm=True, warm_idle_s=120.0)


async def service_of(stage: Stage) -> Service:
    service = Service(stage.objects, stage.rt)
    await service.ensure_defaults()
    return service


async def launch(stage: Stage, name: str, **more: Any) -> Vm:
    """As a user asks for it; returns when it runs."""
    spec = {"image": "img", "nics": [{}], **more.pop("spec", {})}
    vm = (await (await service_of(stage)).create_vms({"name": name, "spec": spec, **more})).items[0]
    assert isinstance(vm, Vm)
    return await runs(stage, vm.meta.id)


async def runs(stage: Stage, id: str) -> Vm:
    end = asyncio.get_running_loop().time() + 100
    while (vm := await stage.objects.get(Vm, id)).status.phase != "running":
        assert asyncio.get_running_loop().time() < end, vm.status
        await asyncio.sleep(0.05)
    return vm


async def offers(stage: Stage, count: int, limit: float = 60.0) -> list[Offer]:
    """As soon as so many wait."""
    end = asyncio.get_running_loop().time() + limit
    while True:
        found = [one for one in await ReadyBook(stage.store).all() if one.machine.ready]
        if len(found) == count and len(await stage.engine.pool()) == count:
            return found
        assert asyncio.get_running_loop().time() < end, (found, await stage.engine.pool())
        await asyncio.sleep(0.1)


async def in_use(stage: Stage) -> Offer:
    """A template that was launched from once, and the machine that waits then."""
    await stage.done(await order(stage))
    first = await launch(stage, "first")
    assert not start_of(first).warm
    (offer,) = await offers(stage, 1)
    return offer


def nothing_left(stage: Stage, *but: str) -> None:
    assert set(stage.world.machines) == set(but)
    assert set(stage.disks.inventory()) == set(but)


def test_after_a_fork_another_waits_and_the_next_launch_has_it() -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        pid = stage.world.machines[offer.machine.id].pid
        assert (await stage.engine.inspect(offer.machine.id)).state is State.ABSENT
        vm = await launch(stage, "second")
        machine = stage.world.machines[vm.meta.id]
        assert (vm.meta.id, machine.pid, machine.machine.name) == (offer.machine.id, pid, "second")
        assert vm.spec.nics[0].mac == offer.machine.mac == machine.machine.cards[0].mac
        assert machine.links == {"net0": True}
        assert machine.told.hostname == "second"  # type: ignore[attr-defined]
        assert (start_of(vm).how, start_of(vm).warm) == ("fork", True)
        assert machine.forwards[0].host == vm.status.ports[0].host
        (other,) = await offers(stage, 1)
        assert other.machine.id != offer.machine.id
        await asyncio.sleep(6)
        assert (await template_of(stage)).status.warm == 1

    on_stage(test, settings=WARM)


def test_one_that_waits_has_rehearsed_as_nobody_and_with_its_cables_out() -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        machine = stage.world.machines[offer.machine.id]
        told = machine.told
        assert (told.hostname, told.authorized_keys, told.mac) == ("template", b"", offer.machine.mac)  # type: ignore[attr-defined]
        assert (machine.state, machine.links) == (State.CREATED, {"net0": False})
        await launch(stage, "second")
        assert machine.told.seed != told.seed  # type: ignore[attr-defined]
        assert machine.told.authorized_keys  # type: ignore[attr-defined]

    on_stage(test, settings=WARM)


def test_one_whose_rehearsal_fails_is_ended_and_no_launch_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise Unavailable("nobody answers", code="unresponsive")

    async def test(stage: Stage) -> None:
        monkeypatch.setattr("corral.agent.templates.pool.rehearse", fail)
        await stage.done(await order(stage))
        first = await launch(stage, "first")
        await asyncio.sleep(5)
        nothing_left(stage, first.meta.id)
        assert await ReadyBook(stage.store).all() == []
        assert start_of(await launch(stage, "second")).how == "fork"

    on_stage(test, settings=WARM)


def test_two_launches_never_get_the_same_one() -> None:
    async def test(stage: Stage) -> None:
        await in_use(stage)
        service = await service_of(stage)
        asked = [service.create_vms({"name": f"vm-{n}", "spec": {"image": "img", "nics": [{}]}}) for n in range(5)]
        vms = [answer.items[0].meta.id for answer in await asyncio.gather(*asked)]
        assert len(set(vms)) == 5
        made = [await runs(stage, id) for id in vms]
        assert sum(start_of(vm).warm for vm in made) == 1

    on_stage(test, settings=WARM)


@pytest.mark.parametrize(
    "spec", [{"cold": True}, {"user_data": "#!"}, {"nics": [{"mac": "52:54:00:aa:bb:cc"}]}, {"memory": {"size": GIB}}]
)
def test_what_it_was_not_made_for_does_not_get_it(spec: dict[str, Any]) -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        vm = await launch(stage, "other", spec=spec)
        assert vm.meta.id != offer.machine.id
        assert [one.machine.id for one in await offers(stage, 1)] == [offer.machine.id]

    on_stage(test, settings=WARM)


def test_one_that_died_is_noticed_when_it_is_given_and_the_launch_is_forked() -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        stage.world.crash(offer.machine.id)
        vm = await launch(stage, "second")
        assert vm.meta.id == offer.machine.id
        assert (start_of(vm).how, start_of(vm).warm) == ("fork", False)

    on_stage(test, settings=WARM)


def test_one_that_died_while_it_waits_is_replaced() -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        stage.world.crash(offer.machine.id)
        await asyncio.sleep(6)
        (other,) = await offers(stage, 1)
        assert other.machine.id != offer.machine.id

    on_stage(test, settings=WARM)


def test_of_a_template_that_is_stale_or_deleted_none_waits() -> None:
    async def test(stage: Stage) -> None:
        await in_use(stage)
        await launch(stage, "second")
        stage.world.templates.spoil((await template_of(stage)).meta.id)
        vm = await launch(stage, "third")
        assert start_of(vm).how == "cold"
        await offers(stage, 0)

    on_stage(test, settings=WARM)

    async def deleted(stage: Stage) -> None:
        await stage.done(await order(stage))
        vm = await launch(stage, "first")
        await offers(stage, 1)
        await (await service_of(stage)).delete_vm(vm.meta.id, force=True)
        await retire(stage)
        await offers(stage, 0)
        await asyncio.sleep(10)
        nothing_left(stage)
        with pytest.raises(NotFound):
            await template_of(stage)

    on_stage(deleted, settings=WARM)


def test_after_some_time_without_a_launch_none_waits() -> None:
    async def test(stage: Stage) -> None:
        await in_use(stage)
        await asyncio.sleep(WARM.warm_idle_s + 10)
        assert await offers(stage, 0) == []

    on_stage(test, settings=WARM)


def test_after_a_restart_of_the_daemon_one_is_made_and_counted_at_once() -> None:
    async def test(stage: Stage) -> None:
        await in_use(stage)
        await stage.stop()
        await stage.start()
        await offers(stage, 1, limit=1.5)
        await asyncio.sleep(1)
        assert (await template_of(stage)).status.warm == 1

    on_stage(test, settings=WARM)


def test_it_can_be_switched_off() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        await launch(stage, "first")
        await asyncio.sleep(30)
        assert await offers(stage, 0) == []

    on_stage(test)


def test_a_vm_that_needs_the_memory_comes_first() -> None:
    async def test(stage: Stage) -> None:
        await in_use(stage)
        stage.facts = FakeFacts(memory=2 * GIB, memory_available=2 * GIB)
        room = stage.agent.entrance
        free = next(size for size in range(64 * MIB, 2 * GIB, MIB) if room.lacks(Memory(size=size), 1)) - MIB
        vm = await launch(stage, "big", spec={"cold": True, "memory": {"size": free + 8 * MIB}})
        assert vm.status.phase == "running"
        assert await offers(stage, 0) == []

    on_stage(test, settings=WARM)


def test_one_whose_vm_is_deleted_or_stopped_before_it_began_ends() -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        stage.points.die_at, stage.points.died = "create.volume", asyncio.Event()
        service = await service_of(stage)
        await service.create_vms({"name": "gone", "spec": {"image": "img", "nics": [{}]}})
        await stage.points.died.wait()
        await stage.stop()
        await service.delete_vm(offer.machine.id, force=True)
        await stage.start()
        await asyncio.sleep(10)
        with pytest.raises(NotFound):
            await stage.objects.get(Vm, offer.machine.id)
        assert offer.machine.id not in stage.world.machines
        assert offer.machine.id not in stage.disks.inventory()

    on_stage(test, settings=WARM)


@pytest.mark.parametrize("point", [*WARM_POINTS, "engine.take.given", "engine.take.recorded", "create.ports"])
def test_killed_at_any_step_it_is_a_vms_or_nobodys_and_nothing_is_left(point: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        first = await launch(stage, "first")
        taking = point in ("engine.take.given", "engine.take.recorded", "create.ports")
        if taking or point in ("warm.withdrawn", "warm.ending"):
            await offers(stage, 1)
        died = stage.points.died = asyncio.Event()
        stage.points.die_at = point
        stopping = asyncio.create_task(stage.stop()) if point == "warm.ending" else None
        ids = {first.meta.id}
        if taking:
            answer = await (await service_of(stage)).create_vms({"name": "vm", "spec": {"image": "img", "nics": [{}]}})
            ids.add(answer.items[0].meta.id)
        elif point == "warm.withdrawn":
            stage.agent.pool.press()
        async with asyncio.timeout(30):
            await died.wait()
        for task in stage._running:
            task.cancel()
        await (stopping or stage.stop())
        await stage.start()
        for id in ids:
            assert (await runs(stage, id)).status.phase == "running"
        stage.agent.pool.press()
        await offers(stage, 0)
        nothing_left(stage, *ids)
        assert await ReadyBook(stage.store).all() == []

    on_stage(test, settings=WARM)


def test_a_daemon_that_ends_leaves_none_and_the_next_makes_them_again() -> None:
    async def test(stage: Stage) -> None:
        offer = await in_use(stage)
        await asyncio.sleep(6)  # that it was used is written down with the next look
        await stage.stop()
        assert [id for id, machine in stage.world.machines.items() if machine.warm] == []
        assert await ReadyBook(stage.store).all() == []
        await stage.start()
        (other,) = await offers(stage, 1)
        assert other.machine.id != offer.machine.id

    on_stage(test, settings=WARM)


def test_one_that_cannot_be_ended_holds_nobody_up_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kill, tried = FakeEngine.kill, list[str]()

    async def stuck(self: FakeEngine, id: str) -> None:
        tried.append(id)
        if len(tried) == 1:
            raise Unavailable("its disk hangs", code="unresponsive")
        await kill(self, id)

    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        died = stage.points.died = asyncio.Event()
        stage.points.die_at = "warm.made"
        first = await launch(stage, "first")
        await died.wait()
        await stage.stop()
        monkeypatch.setattr(FakeEngine, "kill", stuck)
        await stage.start()
        second = await launch(stage, "second")
        await asyncio.sleep(10)
        assert tried[:2] == [tried[0]] * 2
        (offer,) = await offers(stage, 1)
        nothing_left(stage, first.meta.id, second.meta.id, offer.machine.id)

    on_stage(test, settings=WARM)
