"""Templates and forks on a pretended host: made, chosen, refused, noticed when stale, removed; killed in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from corral.agent.grants.absent import NoGovernor
from corral.agent.grants.cpu import ARRIVING_S
from corral.agent.settings import Settings
from corral.engine.fake import FakeEngine
from corral.engine.protocol import Drive
from corral.engine.protocol import Template as Frozen
from corral.errors import CorralError, NotFound
from corral.governor.protocol import Plan
from corral.guest.fake import FakeGuest
from corral.guest.protocol import Identity
from corral.host.cgroup.none import NoGroups
from corral.model import Image, Memory, Meta, Task, TaskState, Template, TemplateSpec
from corral.model.vm import start_of
from corral.store.objects import Create
from corral.units import GIB, MIB
from tests.unit.stage import Stage, mac_of, on_stage, vm_id

AUTO = Settings(templates=True)


async def order(stage: Stage, name: str = "warm", **spec: Any) -> str:
    """A template with its task, as the API writes them; the task's id."""
    fields: dict[str, Any] = {"image": "img", "image_id": "image-img", **spec}
    meta = Meta(id=vm_id(f"template {name}"), name=name, created=stage.rt.clock.now())
    template = Template(meta=meta, spec=TemplateSpec(**fields))
    task = stage.task("template", template, 600.0)
    await stage.objects.commit([Create(template), Create(task)])
    return task.meta.id


async def template_of(stage: Stage, name: str = "warm") -> Template:
    return await stage.objects.find(Template, name)


async def until(stage: Stage, phase: str, name: str = "warm", limit: float = 300.0) -> Template:
    end = asyncio.get_running_loop().time() + limit
    while True:
        template = await template_of(stage, name)
        if template.status.phase == phase:
            return template
        assert asyncio.get_running_loop().time() < end, f"never {phase}: {template.status}"
        await asyncio.sleep(0.1)


async def gone(stage: Stage, name: str = "warm", limit: float = 60.0) -> None:
    end = asyncio.get_running_loop().time() + limit
    while True:
        try:
            await template_of(stage, name)
        except NotFound:
            return
        assert asyncio.get_running_loop().time() < end, "the template never went"
        await asyncio.sleep(0.1)


async def retire(stage: Stage, name: str = "warm") -> None:
    template = await template_of(stage, name)

    def doomed(now: Template) -> Template:
        return msgspec.structs.replace(now, meta=msgspec.structs.replace(now.meta, deleted=stage.rt.clock.now()))

    await stage.objects.change(Template, template.meta.id, doomed)


def told(stage: Stage, name: str) -> Identity:
    found = stage.world.machines[vm_id(name)].told
    assert isinstance(found, Identity)
    return found


def test_a_template_is_booted_frozen_and_nothing_of_its_guest_is_left() -> None:
    async def test(stage: Stage) -> None:
        done = await stage.done(await order(stage))
        assert done.status.state is TaskState.DONE
        names = [step.name for step in done.status.steps]
        assert names == ["turn", "volume", "start", "boot", "settle", "freeze", "power off"]
        template = await template_of(stage)
        assert (template.status.phase, template.status.memory, template.status.host) == ("ready", 512 * MIB, "here")
        assert template.status.made_at is not None
        assert stage.world.machines == {}
        assert stage.disks.inventory() == []
        assert [one.id for one in await stage.engine.templates()] == [template.meta.id]

    on_stage(test)


def test_a_launch_that_fits_is_forked_and_somebody_of_its_own_before_its_link_is_up() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        plugged: list[tuple[str, object]] = []
        link = stage.engine.link

        async def watched(id: str, card: str, up: bool) -> None:
            plugged.append((id, stage.world.machines[id].told))
            await link(id, card, up)

        stage.engine.link = watched  # type: ignore[method-assign]
        for name in ("one", "two"):
            await stage.launch(name)
        for name in ("one", "two"):
            vm = await stage.phase("running", name)
            start = start_of(vm)
            assert (vm.status.template, start.how, start.done) == ("warm", "fork", True)
            assert list(start.timings) == ["disk", "process", "resumed", "answer", "identity"]
            assert stage.world.machines[vm_id(name)].links == {"net0": True}
        one, two = told(stage, "one"), told(stage, "two")
        assert {id for id, identity in plugged if isinstance(identity, Identity)} == {vm_id("one"), vm_id("two")}
        assert (one.hostname, one.mac, one.machine_id) == ("one", mac_of("one"), vm_id("one").replace("-", ""))
        assert one.seed is not None
        assert len(one.seed) == 32
        assert one.seed != two.seed
        assert one.address == "10.0.2.15/24"
        assert one.ssh_host_key
        await asyncio.sleep(6)
        template = await template_of(stage)
        assert template.status.forks == 2
        assert template.status.used_at is not None

    on_stage(test)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"cold": True}, "it was asked for"),
        ({"user_data": "#!/bin/sh\n"}, "its user data runs at a first boot"),
        ({"memory": Memory(size=GIB)}, "there is no template of img with 1 CPU, 1G"),
        ({"nics": ()}, "there is no template of img with 1 CPU, 512M and no card"),
    ],
)
def test_what_cannot_be_forked_boots_and_says_why(spec: dict[str, Any], why: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        await stage.launch(**spec)
        task = await stage.done("task-launch-web-1")
        assert why in " ".join(step.message for step in task.status.steps)
        vm = await stage.phase("running")
        assert vm.status.template == ""
        assert start_of(vm).how == "cold"
        assert why in start_of(vm).why

    on_stage(test)


def test_a_restart_boots_from_its_own_disk() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        await stage.launch()
        await stage.phase("running")
        layers = stage.disks.layers(vm_id())
        assert [layer.name for layer in layers] == ["root.qcow2", "base-1.qcow2"]
        await stage.done(await stage.ask("restart"))
        vm = await stage.phase("running")
        assert (start_of(vm).how, vm.status.template) == ("cold", "")
        drive = stage.world.machines[vm_id()].machine.drives[0]
        assert (drive.path, *(layer.path for layer in drive.layers[:-1])) == layers
        assert stage.world.machines[vm_id()].links == {"net0": True}

    on_stage(test)


def test_a_template_of_another_project_is_never_used() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        template = await template_of(stage)
        other = msgspec.structs.replace(
            template, meta=Meta(id=vm_id("other"), name="other", project="theirs"), status=template.status
        )
        await stage.objects.create(other)
        await retire(stage)
        await gone(stage)
        await stage.launch()
        vm = await stage.phase("running")
        assert start_of(vm).how == "cold"

    on_stage(test)


def test_a_stale_template_is_not_used_and_is_made_again() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        first = await template_of(stage)
        stage.world.templates.upgrade()
        await stage.launch()
        vm = await stage.phase("running")
        assert start_of(vm).how == "cold"
        await asyncio.sleep(30)
        again = await until(stage, "ready")
        assert again.meta.id == first.meta.id
        assert again.status.hardware != first.status.hardware
        await stage.launch("two")
        assert start_of(await stage.phase("running", "two")).how == "fork"
        assert "Stale" in await stage.events()

    on_stage(test)


def test_a_template_that_becomes_stale_at_the_last_moment_loses_no_launch() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        template = await template_of(stage)
        hardware = await stage.engine.hardware(next(iter(await stage.engine.templates())).machine)
        stage.world.templates.spoil(template.meta.id)

        async def as_before(_machine: object) -> str:
            return hardware

        stage.engine.hardware = as_before  # type: ignore[method-assign]
        await stage.launch()
        vm = await stage.phase("running")
        assert start_of(vm).how == "cold"
        assert "warm" in start_of(vm).why

    on_stage(test)


def test_one_in_use_stays_until_its_forks_are_gone() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        await stage.launch()
        await stage.phase("running")
        await retire(stage)
        await asyncio.sleep(20)
        assert "used" in (await template_of(stage)).status.reason
        await stage.done(await stage.ask("delete", force=True))
        await gone(stage)
        assert await stage.engine.templates() == []

    on_stage(test)


def test_the_first_cold_launch_makes_a_template_for_the_next() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("one")
        await stage.phase("running", "one")
        template = await until(stage, "ready", "img-1x512m")
        assert template.spec.auto
        await stage.launch("two")
        assert start_of(await stage.phase("running", "two")).template == "img-1x512m"
        assert len((await stage.objects.list(Template)).items) == 1

    on_stage(test, settings=AUTO)


def test_no_template_is_made_unless_that_is_turned_on() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await asyncio.sleep(60)
        assert (await stage.objects.list(Template)).items == ()

    on_stage(test)


def test_the_budget_holds_and_the_least_used_goes_first() -> None:
    async def test(stage: Stage) -> None:  # a quarter of 8 GiB: two of 1 GiB, not three
        for name, size in (("one", 1024), ("two", 1025), ("three", 1026)):
            await stage.launch(name, memory=Memory(size=size * MIB))
            await stage.phase("running", name)
            await asyncio.sleep(60)
            await stage.done(await stage.ask("delete", name, force=True))
        left = (await stage.objects.list(Template)).items
        assert sorted(one.spec.memory // MIB for one in left) == [1026]
        await stage.launch("big", memory=Memory(size=3 * GIB))
        await stage.phase("running", "big")
        await asyncio.sleep(60)
        assert len((await stage.objects.list(Template)).items) == 1

    on_stage(test, settings=AUTO)


def test_a_template_that_nobody_uses_makes_room_for_a_vm() -> None:
    async def test(stage: Stage) -> None:
        stage.facts = stage.facts._replace(memory=2 * GIB, memory_available=2 * GIB)
        await stage.launch("one")
        await stage.phase("running", "one")
        await until(stage, "ready", "img-1x512m")
        await stage.done(await stage.ask("delete", "one", force=True))
        await stage.launch("big", memory=Memory(size=1536 * MIB))
        await stage.phase("running", "big")
        assert all(one.spec.memory != 512 * MIB for one in (await stage.objects.list(Template)).items)

    on_stage(test, settings=AUTO._replace(template_memory=0.5))


def test_a_template_waits_for_twice_its_memory_and_is_counted_so_while_it_is_made() -> None:
    async def test(stage: Stage) -> None:
        stage.facts = stage.facts._replace(memory=1 * GIB + 400 * MIB)  # of which the host keeps something
        await stage.launch("small", memory=Memory(size=64 * MIB))
        await stage.phase("running", "small")
        task = await order(stage)
        await asyncio.sleep(60)
        step = (await stage.objects.get(Task, task)).status.steps[-1]
        assert (await template_of(stage)).status.phase == "pending"
        assert "takes its memory twice while it is made" in step.message
        stage.facts = stage.facts._replace(memory=2 * GIB)
        stage.points.die_at, stage.points.died = "template.spawned", asyncio.Event()
        await asyncio.wait_for(stage.points.died.wait(), 60)
        assert stage.agent.stock.held() == 1 * GIB
        await stage.stop()
        await stage.start()  # what is made already is not counted against itself
        assert (await stage.done(task)).status.state is TaskState.DONE
        assert stage.agent.stock.held() == 512 * MIB

    on_stage(test)


def test_a_vm_is_not_frozen_without_memory_for_the_copy() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("parent")
        await stage.phase("running", "parent")
        stage.facts = stage.facts._replace(memory_available=500 * MIB)
        await fork(stage, "parent", "child")
        task = await stage.done("task-launch-child-1")
        assert task.status.state is TaskState.FAILED
        assert "there is no memory for a copy of it" in (await stage.vm("child")).status.reason
        assert await stage.engine.templates() == []

    on_stage(test)


@pytest.mark.parametrize("while_away", [False, True])
def test_a_template_without_a_record_is_told_of_and_can_go(while_away: bool) -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        template = await template_of(stage)
        if while_away:
            await stage.stop()
        await stage.objects.delete(template)
        if while_away:
            await stage.start()
        await asyncio.sleep(30)
        lost = await until(stage, "lost", f"lost-{template.meta.id}")
        assert (lost.meta.id, lost.status.memory) == (template.meta.id, 512 * MIB)
        assert lost.meta.name in (await stage.told("UnknownTemplate")).message
        await stage.launch()
        assert start_of(await stage.phase("running")).how == "cold"
        await asyncio.sleep(1000)
        assert [one.id for one in await stage.engine.templates()] == [template.meta.id], "nobody asked for its end"
        if while_away:
            await retire(stage, lost.meta.name)
        else:  # like any that nobody uses, it makes room for a VM
            stage.facts = stage.facts._replace(memory=2 * GIB, memory_available=2 * GIB)
            await stage.launch("big", memory=Memory(size=1 * GIB))
            await stage.phase("running", "big")
        await gone(stage, lost.meta.name)
        assert await stage.engine.templates() == []

    on_stage(test)


def test_a_guest_that_does_not_take_its_identity_stays_unplugged_and_says_so() -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        refuse_identities(stage, 3)
        await stage.launch()
        vm = await stage.until("told", lambda vm: "no identity of its own" in vm.status.reason)
        assert "machine-id" in vm.status.reason
        assert stage.world.machines[vm_id()].links == {"net0": False}
        await stage.phase("running")
        assert stage.world.machines[vm_id()].links == {"net0": True}

    on_stage(test)


class Told(NoGovernor):
    """A governor that keeps what it is told: whom it weighs, and since when."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.since = stage, dict[str, float]()

    def follow(self, plan: Plan) -> None:
        for vm in plan.vms:
            self.since.setdefault(vm.id, self.stage.rt.clock.monotonic())


class Weighed(NoGroups):
    """Control groups that keep the weights they are given."""

    def __init__(self) -> None:
        super().__init__("a test")
        self.weights: dict[str, float] = {}

    def weight(self, id: str, cores: float) -> None:
        self.weights[id] = cores


def test_a_fork_weighs_a_core_until_it_is_somebody_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: FakeGuest, identity: Identity, timeout: float = 5.0) -> None:
        raise CorralError("the guest failed at taking its identity: machine-id", code="guest")

    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        await stage.stop()
        stage.groups, stage.governing = groups, governing = Weighed(), Told(stage)
        await stage.start()
        await stage.launch("cold", cold=True)
        await stage.phase("running", "cold")
        assert groups.weights == {}, "one that boots is weighed like any other from its start"
        monkeypatch.setattr(FakeGuest, "identify", refuse)
        began = stage.rt.clock.monotonic()
        await stage.launch("never")
        await asyncio.sleep(3)
        assert groups.weights == {vm_id("never"): 1.0}
        assert vm_id("never") not in governing.since
        await asyncio.sleep(10)
        assert ARRIVING_S <= governing.since[vm_id("never")] - began <= ARRIVING_S + 3
        monkeypatch.undo()
        began = stage.rt.clock.monotonic()
        await stage.launch("soon")
        await stage.phase("running", "soon")
        await asyncio.sleep(1.5)
        assert governing.since[vm_id("soon")] - began <= 2.5

    on_stage(test)


def test_a_template_is_frozen_with_its_line_open_and_the_files_that_forks_write_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    identify, close, freeze = FakeGuest.identify, FakeGuest.close, FakeEngine.freeze

    async def identified(self: FakeGuest, identity: Identity, timeout: float = 5.0) -> None:
        told.append((identity.authorized_keys, identity.dns))
        await identify(self, identity, timeout)

    async def closed(self: FakeGuest) -> None:
        told.append("closed")
        await close(self)

    async def frozen(self: FakeEngine, *arguments: Any) -> Frozen:
        done = await freeze(self, *arguments)
        told.append("frozen")
        return done

    async def test(stage: Stage) -> None:
        for who, name, does in (
            (FakeGuest, "identify", identified),
            (FakeGuest, "close", closed),
            (FakeEngine, "freeze", frozen),
        ):
            monkeypatch.setattr(who, name, does)
        await stage.done(await order(stage))
        assert told == [(b"", ("10.0.2.3",)), "frozen", "closed"]

    on_stage(test)


def refuse_identities(stage: Stage, times: int) -> None:
    """The next identities are not taken, by no guest."""
    original, left = FakeGuest.identify, [times]

    async def identify(self: FakeGuest, identity: Identity, timeout: float = 5.0) -> None:
        if left[0]:
            left[0] -= 1
            raise CorralError("the guest failed at taking its identity: machine-id", code="guest")
        FakeGuest.identify = original  # type: ignore[method-assign]
        await original(self, identity, timeout)

    FakeGuest.identify = identify  # type: ignore[method-assign]


async def fork(stage: Stage, parent: str, *names: str, name: str = "frozen") -> None:
    """Forks of a running VM, as the API writes them."""
    vm = await stage.vm(parent)
    now = stage.rt.clock.now()
    meta = Meta(id=vm_id(f"{name} {parent} {now}"), name=f"{name}-{parent}", created=now)
    spec = TemplateSpec(image="img", image_id="image-img", auto=True, source=vm.meta.id)
    await stage.objects.create(Template(meta=meta, spec=spec))
    for name in names:
        await stage.launch(name, template=meta.id)


def test_forks_of_a_running_vm_share_its_state_and_their_template_goes() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("parent")
        await stage.phase("running", "parent")
        pid = stage.world.machines[vm_id("parent")].pid
        await fork(stage, "parent", "one", "two")
        for name in ("one", "two"):
            vm = await stage.phase("running", name)
            assert (start_of(vm).how, start_of(vm).source) == ("fork", "parent")
            assert start_of(vm).pause_s is not None
            assert told(stage, name).hostname == name
        assert stage.world.machines[vm_id("parent")].pid == pid
        layers = [layer.name for layer in stage.disks.layers(vm_id("parent"))]
        assert layers == ["root-2.qcow2", "root.qcow2"]
        await fork(stage, "one", "grandchild")
        assert start_of(await stage.phase("running", "grandchild")).source == "one"
        for name in ("one", "two", "grandchild"):
            await stage.done(await stage.ask("delete", name, force=True))
        await gone(stage, "frozen-parent")
        await gone(stage, "frozen-one")
        assert await stage.engine.templates() == []

    on_stage(test)


def test_a_vm_whose_freeze_nobody_waited_for_can_be_forked_again() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("parent")
        await stage.phase("running", "parent")
        freeze = stage.engine.freeze

        async def cut(id: str, template: str, overlays: Mapping[str, Drive]) -> Frozen:
            made = await freeze(id, template, overlays)
            await retire(stage, "frozen-parent")
            await asyncio.sleep(3600)
            return made

        stage.engine.freeze = cut  # type: ignore[method-assign]
        await fork(stage, "parent")
        await gone(stage, "frozen-parent")
        stage.engine.freeze = freeze  # type: ignore[method-assign]
        assert stage.world.machines[vm_id("parent")].machine.drives[0].path.name == "root-2.qcow2"
        await fork(stage, "parent", "child")
        assert start_of(await stage.phase("running", "child")).source == "parent"
        layers = [layer.name for layer in stage.disks.layers(vm_id("parent"))]
        assert layers == ["root-3.qcow2", "root-2.qcow2", "root.qcow2"]

    on_stage(test)


def test_a_vm_that_is_forked_twice_at_once_is_frozen_twice() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("parent")
        await stage.phase("running", "parent")
        freeze = stage.engine.freeze

        async def slow(id: str, template: str, overlays: Mapping[str, Drive]) -> Frozen:
            await asyncio.sleep(2)
            return await freeze(id, template, overlays)

        stage.engine.freeze = slow  # type: ignore[method-assign]
        await fork(stage, "parent", "one")
        await fork(stage, "parent", "two", name="again")
        for name in ("one", "two"):
            assert start_of(await stage.phase("running", name)).source == "parent"

    on_stage(test)


def test_a_fork_of_a_vm_that_does_not_run_fails_and_never_boots() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("parent")
        await stage.phase("running", "parent")
        await stage.done(await stage.ask("stop", "parent", force=True))
        await fork(stage, "parent", "child")
        task = await stage.done("task-launch-child-1")
        assert task.status.state is TaskState.FAILED
        vm = await stage.vm("child")
        assert vm.status.phase == "error"
        assert "was to be forked from failed" in vm.status.reason
        assert vm_id("child") not in stage.world.machines

    on_stage(test)


@pytest.mark.parametrize(
    "point",
    ["template.disk", "template.spawned", "template.answered", "template.settled", "engine.freeze.prepared",
     "engine.freeze.recorded", "template.frozen", "template.cleared", "template.made"],
)  # fmt: skip
def test_killed_while_a_template_is_made_it_is_still_made_and_nothing_is_left(point: str) -> None:
    async def test(stage: Stage) -> None:
        stage.points.die_at, stage.points.died = point, asyncio.Event()
        task = await order(stage)
        await asyncio.wait_for(stage.points.died.wait(), 60)
        await stage.stop()
        await stage.start()
        assert (await stage.done(task)).status.state is TaskState.DONE
        template = await until(stage, "ready")
        assert stage.world.machines == {}
        assert stage.disks.inventory() == []
        assert [one.id for one in await stage.engine.templates()] == [template.meta.id]
        assert "UnknownMachine" not in await stage.events()

    on_stage(test)


def test_a_daemon_that_ends_in_good_order_leaves_no_guest_of_a_template_and_makes_it_after_its_return() -> None:
    async def test(stage: Stage) -> None:
        task = await order(stage)
        while not stage.world.machines:
            await asyncio.sleep(0.1)
        await stage.stop()
        assert stage.world.machines == {}
        assert stage.disks.inventory() == []
        await stage.start()
        assert (await stage.done(task)).status.state is TaskState.DONE

    on_stage(test)


@pytest.mark.parametrize(
    "point",
    ["create.volume", "fork.disk", "create.ports", "engine.fork.loaded", "create.spawned", "start.resumed",
     "fork.identified", "fork.linked", "start.answered"],
)  # fmt: skip
def test_killed_while_a_vm_is_forked_it_still_comes_up_as_itself(point: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        stage.points.die_at, stage.points.died = point, asyncio.Event()
        await stage.launch()
        await asyncio.wait_for(stage.points.died.wait(), 60)
        await stage.stop()
        await stage.start()
        vm = await stage.phase("running")
        assert start_of(vm).how == "fork"
        assert told(stage, "web").hostname == "web"
        assert stage.world.machines[vm_id()].links == {"net0": True}
        assert [layer.name for layer in stage.disks.layers(vm_id())] == ["root.qcow2", "base-1.qcow2"]

    on_stage(test)


@pytest.mark.parametrize("point", ["template.layered", "engine.freeze.recorded", "template.frozen", "template.made"])
def test_killed_while_a_running_vm_is_frozen_its_forks_still_come(point: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.launch("parent")
        await stage.phase("running", "parent")
        stage.points.die_at, stage.points.died = point, asyncio.Event()
        await fork(stage, "parent", "child")
        await asyncio.wait_for(stage.points.died.wait(), 60)
        await stage.stop()
        await stage.start()
        assert start_of(await stage.phase("running", "child")).source == "parent"
        assert [layer.name for layer in stage.disks.layers(vm_id("parent"))] == ["root-2.qcow2", "root.qcow2"]
        drive = stage.world.machines[vm_id("parent")].machine.drives[0]
        assert drive.path.name == "root-2.qcow2"

    on_stage(test)


@pytest.mark.parametrize("point", ["template.delete", "template.discarded"])
def test_killed_while_a_template_is_deleted_it_still_goes(point: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.done(await order(stage))
        stage.points.die_at, stage.points.died = point, asyncio.Event()
        await retire(stage)
        await asyncio.wait_for(stage.points.died.wait(), 60)
        await stage.stop()
        await stage.start()
        await gone(stage)
        assert await stage.engine.templates() == []

    on_stage(test)


def test_the_image_of_a_template_that_is_gone_takes_the_platforms_own_along() -> None:
    async def test(stage: Stage) -> None:
        await stage.launch()
        await stage.phase("running")
        await until(stage, "ready", "img-1x512m")
        await stage.done(await stage.ask("delete", force=True))
        await stage.objects.delete(await stage.objects.get(Image, "image-img"))
        await gone(stage, "img-1x512m")

    on_stage(test, settings=AUTO)
