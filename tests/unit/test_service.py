"""What requests mean, on the memory store and without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from corral.api.service import Service
from corral.errors import CorralError, Invalid, NotFound, Refused
from corral.model import (
    Disk,
    Flavor,
    Host,
    HostStatus,
    Image,
    ImagePhase,
    ImageStatus,
    Meta,
    Network,
    Phase,
    Power,
    Project,
    Task,
    TaskState,
    Vm,
    Volume,
)  # fmt: skip
from corral.runtime import Runtime, SeededRandom
from corral.store.memory import MemoryStore
from corral.store.objects import Objects
from corral.units import GIB, MIB


class Cut(BaseException):
    """The daemon died here."""


class CutAt:
    """Dies at a fault point, once."""

    def __init__(self) -> None:
        self.point = ""

    async def at(self, point: str) -> None:
        if point == self.point:
            self.point = ""
            raise Cut(point)


@pytest.fixture
def faults() -> CutAt:
    return CutAt()


@pytest.fixture
async def service(faults: CutAt) -> Service:
    rt = Runtime(random=SeededRandom(1), faults=faults)
    service = Service(Objects(MemoryStore(rt), rt), rt)
    await service.ensure_defaults()
    return service


async def ready_image(service: Service, name: str = "debian", **status: Any) -> Image:
    made = (await service.create_image({"name": name, "spec": {"source": "build", "recipe": name}})).items[0]
    fields = {"phase": ImagePhase.READY, "virtual_size": 2 * GIB, "min_memory": 128 * MIB, "host": "h1"} | status
    return await service.objects.change(
        Image, made.meta.id, lambda image: msgspec.structs.replace(image, status=ImageStatus(**fields))
    )


async def host(service: Service, name: str = "h1", memory: int = 4 * GIB, **status: Any) -> None:
    fields = {"phase": "ready", "arch": "x86_64", "cpus": 2, "memory": memory, "overhead": 64 * MIB} | status
    meta = Meta(id=service.rt.random.id(), name=name)
    await service.objects.create(Host(meta=meta, status=HostStatus(**fields)))


async def vm(service: Service, name: str = "web", **spec: Any) -> Vm:
    made = await service.create_vms({"name": name, "spec": {"image": "debian", **spec}})
    assert isinstance(made.items[0], Vm)
    return made.items[0]


async def seen(service: Service, id: str, phase: Phase, **status: Any) -> Vm:
    """The agent reports."""

    def report(vm: Vm) -> Vm:
        now = msgspec.structs.replace(vm.status, phase=phase, observed=vm.meta.generation, **status)
        return msgspec.structs.replace(vm, status=now)

    return await service.objects.change(Vm, id, report)


async def refusal(work: Any, code: str) -> CorralError:
    with pytest.raises(CorralError) as caught:
        await work
    assert caught.value.code == code, caught.value
    return caught.value


# What is there from the start


async def test_defaults_are_made_once_and_stay_deleted(service: Service) -> None:
    assert [p.meta.name for p in (await service.objects.list(Project)).items] == ["default"]
    assert [n.meta.name for n in (await service.objects.list(Network)).items] == ["user"]
    await service.delete("flavor", "tiny")
    await service.ensure_defaults()
    names = [f.meta.name for f in (await service.objects.list(Flavor)).items]
    assert "tiny" not in names
    assert {"small", "medium", "large"} <= set(names)


# Launch


async def test_a_launch_writes_vm_volume_and_task_at_once(service: Service) -> None:
    image = await ready_image(service)
    revision = (await service.objects.list(Vm)).revision
    made = await service.create_vms({"name": "web", "spec": {"image": "debian"}})
    (one,), (task,) = made.items, made.tasks
    (volume,) = (await service.objects.list(Volume)).items
    assert isinstance(one, Vm)
    assert one.spec.image_id == image.meta.id
    assert one.spec.nics[0].mac.startswith("52:54:00:")
    assert (volume.spec.vm, volume.spec.image_id, volume.spec.size) == (one.meta.id, image.meta.id, 2 * GIB)
    assert (task.spec.verb, task.spec.target_id, task.spec.generation) == ("launch", one.meta.id, 1)
    assert {one.meta.revision, volume.meta.revision, task.meta.revision} == {revision + 1}


async def test_images_without_a_disk_give_no_volume(service: Service) -> None:
    await ready_image(service, "micro", virtual_size=0)
    await service.create_vms({"spec": {"image": "micro"}})
    assert (await service.objects.list(Volume)).items == ()
    error = await refusal(service.create_vms({"spec": {"image": "micro", "disk": {"size": GIB}}}), "invalid")
    assert error.field == "spec.disk.size"


async def test_count_numbers_names_and_gives_each_its_address(service: Service) -> None:
    await ready_image(service)
    made = await service.create_vms({"name": "web", "count": 3, "spec": {"image": "debian"}})
    assert [one.meta.name for one in made.items] == ["web-1", "web-2", "web-3"]
    assert len({one.spec.nics[0].mac for one in made.items if isinstance(one, Vm)}) == 3
    assert len({task.meta.id for task in made.tasks}) == 3


async def test_made_up_names_are_free_ones(service: Service) -> None:
    await ready_image(service)
    names: set[str] = set()
    for _ in range(60):
        made = await service.create_vms({"count": 10, "spec": {"image": "debian"}})
        names |= {one.meta.name for one in made.items}
    assert len(names) == 600


async def test_a_taken_name_is_refused_and_nothing_is_written(service: Service) -> None:
    await ready_image(service)
    await vm(service)
    before = await service.objects.list(Task)
    await refusal(service.create_vms({"name": "web", "spec": {"image": "debian"}}), "exists")
    await refusal(service.create_vms({"name": "web", "spec": {"image": "debian"}}, dry_run=True), "exists")
    assert await service.objects.list(Task) == before


async def test_a_flavor_fills_in_what_was_not_given(service: Service) -> None:
    await ready_image(service)
    one = await vm(service, "one", flavor="medium")
    assert (one.spec.cpu.count, one.spec.memory.size, one.spec.disk.size) == (2, 2 * GIB, 20 * GIB)
    two = await vm(service, "two", flavor="medium", cpu={"count": 1}, disk={"size": 3 * GIB})
    assert (two.spec.cpu.count, two.spec.memory.size, two.spec.disk.size) == (1, 2 * GIB, 3 * GIB)
    await refusal(vm(service, "three", flavor="nothing"), "not-found")


async def test_an_image_must_exist_and_be_usable(service: Service) -> None:
    error = await refusal(vm(service), "not-found")
    assert error.field == "spec.image"
    await ready_image(service, phase=ImagePhase.ERROR, reason="no mirror")
    error = await refusal(vm(service), "wrong-phase")
    assert "no mirror" in error.message


async def test_a_vm_may_wait_for_its_image(service: Service) -> None:
    await ready_image(service, phase=ImagePhase.FETCHING)
    assert (await vm(service)).status.phase is Phase.PENDING


async def test_the_image_says_what_it_needs(service: Service) -> None:
    await ready_image(service)
    error = await refusal(vm(service, memory={"size": 64 * MIB}, disk={"size": GIB}), "invalid")
    assert isinstance(error, Invalid)
    assert [p.field for p in error.problems] == ["spec.memory.size", "spec.disk.size"]


@pytest.mark.parametrize("field", [{"image_id": "x"}, {"boots": 9}, {"resets": 1}, {"force": True}])
async def test_fields_of_the_platform_cannot_be_given(service: Service, field: dict[str, Any]) -> None:
    await ready_image(service)
    error = await refusal(vm(service, **field), "invalid")
    assert error.field == f"spec.{next(iter(field))}"


async def test_unknown_projects_and_networks_are_told(service: Service) -> None:
    await ready_image(service)
    await refusal(service.create_vms({"project": "other", "spec": {"image": "debian"}}), "not-found")
    error = await refusal(vm(service, nics=[{"network": "lan"}]), "invalid")
    assert error.field == "spec.nics[0].network"


async def test_a_dry_run_writes_nothing(service: Service) -> None:
    await ready_image(service)
    revision = (await service.objects.list(Vm)).revision
    made = await service.create_vms({"name": "web", "spec": {"image": "debian"}}, dry_run=True)
    assert made.items[0].meta.name == "web"
    assert (await service.objects.list(Vm)).revision == revision


# Idempotency


async def test_the_same_key_gives_the_same_answer(service: Service) -> None:
    await ready_image(service)
    body = {"count": 2, "spec": {"image": "debian"}}
    first = await service.create_vms(body, key="k1")
    assert await service.create_vms(body, key="k1") == first
    assert len((await service.objects.list(Vm)).items) == 2
    await refusal(service.create_vms({"spec": {"image": "debian"}}, key="k1"), "idempotency")
    assert (await service.create_vms(body, key="k2")).items != first.items


async def test_the_same_request_sent_many_times_at_once_happens_once(service: Service) -> None:
    await ready_image(service)
    body = {"spec": {"image": "debian"}}
    answers = await asyncio.gather(*(service.create_vms(body, key="k") for _ in range(20)))
    assert len((await service.objects.list(Vm)).items) == 1
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("point", ["api.before-commit", "api.after-commit"])
async def test_a_launch_that_was_cut_is_carried_out_once_by_its_repetition(
    service: Service, faults: CutAt, point: str
) -> None:
    await ready_image(service)
    body = {"spec": {"image": "debian"}}
    faults.point = point
    with pytest.raises(Cut):
        await service.create_vms(body, key="k")
    made = await service.create_vms(body, key="k")
    assert [one.meta.id for one in (await service.objects.list(Vm)).items] == [one.meta.id for one in made.items]
    assert len((await service.objects.list(Task)).items) == 2  # the image's and this


async def test_power_and_images_and_flavors_know_keys_too(service: Service) -> None:
    await ready_image(service)
    one = await vm(service)
    stop = await service.power("stop", "web", {}, key="s")
    assert (await service.power("stop", "web", {}, key="s")).meta.id == stop.meta.id
    assert (await service.objects.get(Vm, one.meta.id)).meta.generation == 2
    await refusal(service.power("start", "web", {}, key="s"), "idempotency")
    body = {"name": "mine", "spec": {"memory": 64 * MIB}}
    assert await service.create_flavor(body, key="f") == await service.create_flavor(body, key="f")
    await refusal(service.create_flavor(body), "exists")
    image = {"name": "up", "spec": {"source": "upload", "format": "raw"}}
    assert await service.create_image(image, key="i") == await service.create_image(image, key="i")
    await refusal(service.create_image(image), "exists")


@pytest.mark.parametrize("key", ["a b", "ä", "x" * 129, "a\n"])
async def test_keys_are_printable(service: Service, key: str) -> None:
    await ready_image(service)
    await refusal(service.create_vms({"spec": {"image": "debian"}}, key=key), "invalid")


# Admission


async def test_what_fits_nowhere_is_refused_with_a_reason_for_each_host(service: Service) -> None:
    await ready_image(service, host="")
    await host(service, "h1", memory=GIB)
    await host(service, "h2", memory=8 * GIB, phase="down")
    error = await refusal(vm(service, memory={"size": 2 * GIB}), "no-capacity")
    reasons = {row["host"]: row["reason"] for row in error.details["hosts"]}
    assert "memory" in reasons["h1"]
    assert "down" in reasons["h2"]
    assert (await service.objects.list(Vm)).items == ()


@pytest.mark.parametrize("followed", [False, True])
async def test_a_burst_is_not_let_in_on_the_same_memory(service: Service, followed: bool) -> None:
    await ready_image(service)
    await host(service, memory=4 * GIB)
    ledger = asyncio.create_task(service.run()) if followed else None
    await asyncio.sleep(0)
    body = {"spec": {"image": "debian", "memory": {"size": GIB - 64 * MIB}}}
    answers = await asyncio.gather(*(service.create_vms(body) for _ in range(10)), return_exceptions=True)
    assert sum(not isinstance(answer, BaseException) for answer in answers) == 4
    await refusal(service.create_vms(body | {"count": 2}), "no-capacity")
    await service.delete_vm((await service.objects.list(Vm)).items[0].meta.name)
    await refusal(service.create_vms(body | {"count": 2}), "no-capacity")
    await service.create_vms(body)
    if ledger is not None:
        ledger.cancel()


async def test_trying_a_change_books_nothing(service: Service) -> None:
    await host(service)
    await ready_image(service)
    first = await vm(service, "first", memory={"size": GIB})
    await seen(service, first.meta.id, Phase.RUNNING, host="h1")
    following = asyncio.create_task(service.ledger.run())
    await asyncio.sleep(0.01)
    await service.patch("vm", "first", {"spec": {"memory": {"size": 3 * GIB}}}, dry_run=True)
    await vm(service, "second", memory={"size": 2 * GIB})
    following.cancel()


async def test_stopped_vms_take_no_memory_until_they_start(service: Service) -> None:
    await ready_image(service)
    await host(service, memory=2 * GIB)
    one = await vm(service, "one", memory={"size": GIB})
    await service.power("stop", "one")
    await seen(service, one.meta.id, Phase.STOPPED, host="h1")
    await vm(service, "two", memory={"size": GIB})
    await refusal(service.power("start", "one"), "no-capacity")
    await refusal(service.patch("vm", "one", {"spec": {"power": "running"}}), "no-capacity")


async def test_before_any_host_is_known_vms_wait(service: Service) -> None:
    await ready_image(service)
    assert (await vm(service)).status.phase is Phase.PENDING
    assert (await service.judge(await service.objects.find(Vm, "web")))["hosts"] == ()


# Power


@pytest.mark.parametrize(
    ("verb", "before", "power"),
    [("stop", Phase.RUNNING, Power.STOPPED), ("start", Phase.STOPPED, Power.RUNNING), ("pause", Phase.RUNNING, Power.PAUSED),
     ("resume", Phase.PAUSED, Power.RUNNING), ("start", Phase.ERROR, Power.RUNNING), ("restart", Phase.RUNNING, Power.RUNNING),
     ("reset", Phase.UNRESPONSIVE, Power.RUNNING)],
)  # fmt: skip
async def test_verbs_write_a_wish_and_a_task(service: Service, verb: str, before: Phase, power: Power) -> None:
    await ready_image(service)
    one = await seen(service, (await vm(service)).meta.id, before)
    task = await service.power(verb, "web", {"timeout_s": 7})
    now = await service.objects.get(Vm, one.meta.id)
    assert now.spec.power is power
    assert now.meta.generation == one.meta.generation + 1 == task.spec.generation
    assert (now.spec.boots, now.spec.resets) == (2 if verb == "restart" else 1, 1 if verb == "reset" else 0)
    assert (task.spec.verb, task.spec.deadline_s, task.status.state) == (verb, 7, TaskState.PENDING)


async def test_force_is_of_one_wish_only(service: Service) -> None:
    await ready_image(service)
    one = await vm(service)
    await service.power("stop", "web", {"force": True})
    assert (await service.objects.get(Vm, one.meta.id)).spec.force
    await service.power("start", "web")
    assert not (await service.objects.get(Vm, one.meta.id)).spec.force


@pytest.mark.parametrize("verb", ["pause", "reset", "resume"])
async def test_what_means_nothing_to_a_stopped_vm_is_refused(service: Service, verb: str) -> None:
    await ready_image(service)
    one = await vm(service)
    await service.power("stop", "web")
    await seen(service, one.meta.id, Phase.STOPPED)
    error = await refusal(service.power(verb, "web"), "wrong-phase")
    assert "stopped" in error.message


async def test_fifty_commands_at_once_are_all_carried_out(service: Service) -> None:
    await ready_image(service)
    one = await seen(service, (await vm(service)).meta.id, Phase.RUNNING)
    verbs = ["stop", "start", "restart", "pause", "start"] * 10
    tasks = await asyncio.gather(*(service.power(verb, "web") for verb in verbs), return_exceptions=True)
    done = [task for task in tasks if isinstance(task, Task)]
    assert all(isinstance(task, Task) or task.code == "wrong-phase" for task in tasks)  # type: ignore[union-attr]
    assert (await service.objects.get(Vm, one.meta.id)).meta.generation == 1 + len(done)
    assert len({task.spec.generation for task in done}) == len(done)


# Delete, cancel


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.STARTING, Phase.STOPPING, Phase.UNRESPONSIVE, Phase.UNKNOWN])
async def test_what_may_run_is_deleted_only_by_force(service: Service, phase: Phase) -> None:
    await ready_image(service)
    one = await seen(service, (await vm(service)).meta.id, phase)
    error = await refusal(service.delete_vm("web"), "wrong-phase")
    assert "--force" in error.hint
    task = await service.delete_vm("web", force=True)
    assert (await service.objects.get(Vm, one.meta.id)).meta.deleted is not None
    assert (await service.delete_vm("web")).meta.id == task.meta.id
    await refusal(service.power("start", "web"), "wrong-phase")
    await refusal(service.patch("vm", "web", {"labels": {"a": "b"}}), "wrong-phase")
    await refusal(service.cancel_task(task.meta.id), "wrong-phase")


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.ERROR, Phase.PENDING])
async def test_what_does_not_run_is_deleted_at_once(service: Service, phase: Phase) -> None:
    await ready_image(service)
    await seen(service, (await vm(service)).meta.id, phase)
    assert (await service.delete_vm("web")).spec.verb == "delete"


@pytest.mark.parametrize(
    ("verb", "back"), [("start", Power.STOPPED), ("restart", Power.STOPPED), ("stop", Power.RUNNING)]
)
async def test_a_cancelled_task_takes_its_wish_back(service: Service, verb: str, back: Power) -> None:
    await ready_image(service)
    one = await vm(service)
    task = await service.power(verb, "web")
    cancelled = await service.cancel_task(task.meta.id)
    assert cancelled.status.state is TaskState.CANCELLED
    assert cancelled.status.error is not None
    assert (await service.objects.get(Vm, one.meta.id)).spec.power is back
    assert await service.cancel_task(task.meta.id) == cancelled


async def test_a_later_wish_survives_the_cancelling_of_an_earlier_one(service: Service) -> None:
    await ready_image(service)
    one = await vm(service)
    launch = (await service.objects.list(Task)).items
    await service.power("restart", "web")
    first = next(task for task in launch if task.spec.verb == "launch")
    await service.cancel_task(first.meta.id)
    assert (await service.objects.get(Vm, one.meta.id)).spec.power is Power.RUNNING


async def test_images_are_asked_to_stop(service: Service) -> None:
    begun = await service.create_image({"name": "debian", "spec": {"source": "build", "recipe": "debian"}})
    task = await service.cancel_task(begun.tasks[0].meta.id)
    assert (task.spec.cancel, task.status.state) == (True, TaskState.PENDING)


async def test_an_image_in_use_stays(service: Service) -> None:
    image = await ready_image(service)
    await vm(service)
    error = await refusal(service.delete_image("debian"), "in-use")
    assert "web" in error.message
    await service.objects.delete((await service.objects.list(Vm)).items[0])
    await service.delete_image("debian")
    assert (await service.objects.get(Image, image.meta.id)).meta.deleted is not None
    await refusal(vm(service, "two"), "wrong-phase")


async def test_deleting_an_image_races_with_launches_and_never_loses_one(service: Service) -> None:
    image = await ready_image(service)

    async def launch(number: int) -> Any:
        return await service.create_vms({"name": f"vm-{number}", "spec": {"image": "debian"}})

    works = [launch(n) for n in range(10)] + [service.delete_image("debian")] + [launch(n) for n in range(10, 20)]
    answers = await asyncio.gather(*works, return_exceptions=True)
    gone = (await service.objects.get(Image, image.meta.id)).meta.deleted is not None
    vms = (await service.objects.list(Vm)).items
    assert gone == (answers[10] is None)
    assert not (gone and vms)
    assert all(answer is None or hasattr(answer, "items") or isinstance(answer, Refused) for answer in answers)


async def test_a_template_is_begun_although_its_image_record_changes_meanwhile(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await ready_image(service)
    fits, changes = service._fits, iter(range(2))

    async def changed_meanwhile(spec: Any, image: Image) -> None:
        await fits(spec, image)
        if next(changes, None) is not None:
            again = msgspec.structs.replace(image.status, reason=service.rt.random.id())
            await service.objects.change(Image, image.meta.id, lambda now: msgspec.structs.replace(now, status=again))

    monkeypatch.setattr(service, "_fits", changed_meanwhile)
    made = await service.create_template({"spec": {"image": "debian"}})
    assert [one.spec.image_id for one in made.items] == [image.meta.id]
    assert [task.spec.target_id for task in made.tasks] == [made.items[0].meta.id]
    assert list(changes) == []


async def test_uploads_are_taken_only_while_they_are_waited_for(service: Service) -> None:
    await service.create_image({"name": "up", "spec": {"source": "upload", "format": "raw"}})
    image, task = await service.upload_target("up")
    assert task.spec.target_id == image.meta.id
    await ready_image(service)
    await refusal(service.upload_target("debian"), "wrong-phase")
    await refusal(service.upload_target("nix"), "not-found")


# Patch


async def test_a_patch_merges_and_counts_generations_of_the_spec_only(service: Service) -> None:
    await ready_image(service)
    one = await vm(service)
    two = await service.patch("vm", "web", {"labels": {"a": "1", "b": "2"}})
    assert (two.meta.labels, two.meta.generation) == ({"a": "1", "b": "2"}, 1)
    three = await service.patch("vm", "web", {"labels": {"a": None}, "spec": {"cpu": {"count": 2}}})
    assert isinstance(three, Vm)
    assert (three.meta.labels, three.meta.generation, three.spec.cpu.count) == ({"b": "2"}, 2, 2)
    assert three.spec.nics == one.spec.nics
    assert await service.patch("vm", "web", {}) == three


async def test_a_stale_patch_is_refused(service: Service) -> None:
    await ready_image(service)
    one = await vm(service)
    await service.patch("vm", "web", {"labels": {"a": "1"}}, revision=one.meta.revision)
    error = await refusal(service.patch("vm", "web", {"labels": {"a": "2"}}, revision=one.meta.revision), "stale")
    assert error.http_status == 412


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"spec": {"image": "other"}}, "spec.image"), ({"spec": {"image_id": "x"}}, "spec.image_id"),
        ({"spec": {"boots": 5}}, "spec.boots"), ({"spec": {"disk": {"size": MIB}}}, "spec.disk.size"),
        ({"spec": {"host": "h2"}}, "spec.host"), ({"status": {"host": "h2"}}, "status"), ({"meta": {"id": "x"}}, "meta"),
        ({"spec": {"cpu": None, "memory": {"size": 1}}}, "spec.memory.size"), ({"labels": {"a b": "1"}}, "labels"),
        ({"spec": {"nics": [{"network": "lan", "mac": "52:54:00:00:00:01"}]}}, "spec.nics[0].network"), ([], "body"),
        ({"spec": []}, "spec"), ({"spec": {"image": None}}, "spec.image"),
    ],
)  # fmt: skip
async def test_patches_that_may_not_be(service: Service, patch: Any, field: str) -> None:
    await ready_image(service)
    one = await vm(service)
    error = await refusal(service.patch("vm", "web", patch), "invalid")
    assert isinstance(error, Invalid)
    assert field in [p.field for p in error.problems]
    assert await service.objects.get(Vm, one.meta.id) == one


async def test_concurrent_patches_are_all_there(service: Service) -> None:
    await ready_image(service)
    await vm(service)
    await asyncio.gather(*(service.patch("vm", "web", {"labels": {f"k{n}": "v"}}) for n in range(30)))
    assert len((await service.objects.find(Vm, "web")).meta.labels) == 30


async def test_every_kind_that_can_be_patched_is(service: Service) -> None:
    await ready_image(service)
    await host(service)
    changes: dict[str, tuple[str, dict[str, Any], Callable[[Any], bool]]] = {
        "host": ("h1", {"cordoned": True}, lambda o: o.spec.cordoned),
        "flavor": ("small", {"cpus": 3}, lambda o: o.spec.cpus == 3),
        "image": ("debian", {"description": "mine"}, lambda o: o.spec.description == "mine"),
        "network": ("user", {"description": "nat"}, lambda o: o.spec.description == "nat"),
        "project": ("default", {"description": "all"}, lambda o: o.spec.description == "all"),
    }
    for kind, (ref, spec, holds) in changes.items():
        assert holds(await service.patch(kind, ref, {"spec": spec}))
    with pytest.raises(NotFound):
        await service.patch("flavor", "nix", {})


# Disks and cards


async def test_a_flavor_limits_the_disk_where_nothing_else_is_asked_for(service: Service) -> None:
    await ready_image(service)
    plan = {"memory": 512 * MIB, "disk": 5 * GIB, "disk_iops": 500, "disk_iops_burst": 900, "disk_bandwidth": 10 * MIB}
    await service.create_flavor({"name": "slow", "spec": plan})
    one = await vm(service, flavor="slow")
    assert one.spec.disk == Disk(size=5 * GIB, iops=500, iops_burst=900, bandwidth=10 * MIB)
    two = await vm(service, "two", flavor="slow", disk={"iops": 700, "bandwidth": None})
    assert two.spec.disk == Disk(size=5 * GIB, iops=700, iops_burst=900)
    error = await refusal(vm(service, "three", flavor="slow", disk={"iops": 1000}), "invalid")
    assert isinstance(error, Invalid)
    assert [p.field for p in error.problems] == ["spec.disk.iops_burst"]


async def test_a_vm_without_a_disk_cannot_have_limits_for_it(service: Service) -> None:
    await ready_image(service, "micro", virtual_size=0)
    await service.create_flavor({"name": "slow", "spec": {"memory": 512 * MIB, "disk": GIB, "disk_iops": 500}})
    made = await service.create_vms({"name": "planned", "spec": {"image": "micro", "flavor": "slow"}})
    assert isinstance(made.items[0], Vm)
    assert made.items[0].spec.disk == Disk()
    body = {"name": "web", "spec": {"image": "micro", "disk": {"iops": 500, "bandwidth": MIB}}}
    error = await refusal(service.create_vms(body), "invalid")
    assert isinstance(error, Invalid)
    assert [p.field for p in error.problems] == ["spec.disk.iops", "spec.disk.bandwidth"]
    await refusal(service.patch("vm", "planned", {"spec": {"disk": {"iops": 500}}}), "invalid")


async def test_a_disk_grows_with_its_volume_and_never_shrinks(service: Service) -> None:
    await ready_image(service)
    one = await vm(service)
    for size in (3 * GIB, 5 * GIB):
        grown = await service.patch("vm", "web", {"spec": {"disk": {"size": size}}})
        assert isinstance(grown, Vm)
        (volume,) = (await service.objects.list(Volume)).items
        assert (grown.spec.disk.size, volume.spec.size, volume.spec.vm) == (size, size, one.meta.id)
    for size in (4 * GIB, None):
        error = await refusal(service.patch("vm", "web", {"spec": {"disk": {"size": size}}}), "invalid")
        assert (error.field, "never shrinks" in error.message) == ("spec.disk.size", True)


async def test_user_mode_networking_says_that_it_cannot_limit_a_card(service: Service) -> None:
    await ready_image(service)
    error = await refusal(vm(service, nics=[{"network": "user", "rate": MIB}]), "invalid")
    assert (error.field, "cannot limit a card's rate" in error.message) == ("spec.nics[0].rate", True)
    one = await vm(service)
    card = {"network": "user", "mac": one.spec.nics[0].mac, "rate": MIB}
    error = await refusal(service.patch("vm", "web", {"spec": {"nics": [card]}}, dry_run=True), "invalid")
    assert error.field == "spec.nics[0].rate"
