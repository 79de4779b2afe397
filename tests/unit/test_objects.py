"""Typed objects: names, swaps, transactions of several writes, watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest

from corral.errors import CorralError, NotFound, Refused, WatchLost
from corral.model import Event, EventSpec, Flavor, FlavorSpec, Meta, Project, Task, TaskSpec, Vm, VmSpec
from corral.runtime import Runtime, SeededRandom
from corral.store.memory import MemoryStore
from corral.store.objects import Create, Objects, Remove, Require, Update
from corral.store.protocol import Put

RT = Runtime(random=SeededRandom(3))


def vm(name: str, project: str = "default", id: str | None = None) -> Vm:
    return Vm(meta=Meta(id=id or RT.random.id(), name=name, project=project), spec=VmSpec(image="micro"))


def booted(one: Vm, boots: int) -> Vm:
    return msgspec.structs.replace(one, spec=msgspec.structs.replace(one.spec, boots=boots))


def task(about: Vm) -> Task:
    id = RT.random.id()
    return Task(meta=Meta(id=id, name=id), spec=TaskSpec(verb="start", target_kind="vm", target_id=about.meta.id))


@pytest.fixture
async def objects() -> AsyncIterator[Objects]:
    store = MemoryStore(RT, history=50)
    yield Objects(store, RT)
    await store.close()


async def test_what_is_created_can_be_read_and_has_its_revision(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    assert made.meta.revision == 1
    assert await objects.get(Vm, made.meta.id) == made


async def test_objects_of_one_create_come_together_or_not_at_all(objects: Objects) -> None:
    await objects.create(vm("taken"))
    with pytest.raises(Refused) as caught:
        await objects.create(vm("free"), vm("taken"))
    assert caught.value.code == "exists"
    assert "taken" in caught.value.message
    assert [one.meta.name for one in (await objects.list(Vm)).items] == ["taken"]
    await objects.create(vm("free"))


async def test_names_are_unique_in_a_project_and_kind_only(objects: Objects) -> None:
    await objects.create(vm("web"), vm("web", "other"))
    await objects.create(Flavor(meta=Meta(id=RT.random.id(), name="web"), spec=FlavorSpec(memory=1)))
    flavor = Flavor(meta=Meta(id=RT.random.id(), name="web", project="other"), spec=FlavorSpec(memory=1))
    with pytest.raises(Refused, match="already"):
        await objects.create(flavor)


async def test_an_id_is_never_used_twice(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    with pytest.raises(Refused) as caught:
        await objects.create(vm("other", id=made.meta.id))
    assert caught.value.code == "exists"


async def test_tasks_and_events_need_no_names_of_their_own(objects: Objects) -> None:
    spec = EventSpec(about_kind="vm", about_id="x", reason="Started")
    for _ in range(2):
        await objects.create(Event(meta=Meta(id=RT.random.id(), name="started"), spec=spec))
    assert len((await objects.list(Event)).items) == 2
    assert {entry.key.split("/")[1] for entry in (await objects.store.range("/")).entries} == {"events"}


async def test_find_by_name_by_project_and_name_by_id_and_by_the_beginning_of_an_id(objects: Objects) -> None:
    a, b = await objects.create(vm("web"), vm("web", "other"))
    assert await objects.find(Vm, "web") == a
    assert await objects.find(Vm, "web", "other") == b
    assert await objects.find(Vm, "other/web") == b
    assert await objects.find(Vm, b.meta.id) == b
    assert await objects.find(Vm, b.meta.id[:6]) == b


async def test_a_beginning_must_be_long_enough_and_fit_only_one(objects: Objects) -> None:
    a, _ = await objects.create(
        vm("a", id="aaaa1111-0000-4000-8000-000000000000"), vm("b", id="aaaa2222-0000-4000-8000-000000000000")
    )
    with pytest.raises(Refused) as caught:
        await objects.find(Vm, "aaaa")
    assert caught.value.code == "ambiguous"
    assert await objects.find(Vm, "aaaa1") == a
    for missing in ("aaa", "aaaa3", "nothing", "", "/", "a/b/c", "aaaa1111/", "\0", "aaaa*"):
        with pytest.raises(NotFound):
            await objects.find(Vm, missing)


async def test_a_name_wins_over_the_beginning_of_an_id(objects: Objects) -> None:
    named, _ = await objects.create(vm("cafe"), vm("x", id="cafe2222-0000-4000-8000-000000000000"))
    assert await objects.find(Vm, "cafe") == named


async def test_a_list_is_by_name_and_of_one_project_if_asked(objects: Objects) -> None:
    await objects.create(vm("c"), vm("a"), vm("b", "other"))
    await objects.create(Project(meta=Meta(id="p", name="other")))
    assert [one.meta.name for one in (await objects.list(Vm)).items] == ["a", "b", "c"]
    assert [one.meta.name for one in (await objects.list(Vm, "other")).items] == ["b"]
    listing = await objects.list(Project, "anything")
    assert [one.meta.name for one in listing.items] == ["other"], "projects are in no project"
    assert listing.revision == 2


async def test_an_update_of_something_that_changed_is_stale(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    newer = await objects.update(booted(made, 2))
    assert newer.meta.revision == 2
    with pytest.raises(Refused) as caught:
        await objects.update(booted(made, 3))
    assert caught.value.code == "stale"
    assert (await objects.get(Vm, made.meta.id)).spec.boots == 2
    with pytest.raises(Refused) as caught:
        await objects.delete(made)
    assert caught.value.code == "stale"


async def test_deletion_frees_the_name_and_ends_updates(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    await objects.delete(made)
    with pytest.raises(NotFound):
        await objects.get(Vm, made.meta.id)
    with pytest.raises(Refused, match="is gone"):
        await objects.update(made)
    await objects.create(vm("web"))


async def test_concurrent_changes_all_happen(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))

    async def one_more() -> None:
        await objects.change(Vm, made.meta.id, lambda one: booted(one, one.spec.boots + 1))

    await asyncio.gather(*(one_more() for _ in range(30)))
    assert (await objects.get(Vm, made.meta.id)).spec.boots == 31


async def test_a_change_to_the_same_writes_nothing(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    assert await objects.change(Vm, made.meta.id, lambda one: None) == made
    assert await objects.change(Vm, made.meta.id, lambda one: booted(one, one.spec.boots)) == made
    assert (await objects.list(Vm)).revision == 1
    with pytest.raises(NotFound):
        await objects.change(Vm, "nothing", lambda one: one)


async def test_a_commit_is_all_or_nothing(objects: Objects) -> None:
    web, db = await objects.create(vm("web"), vm("db"))
    await objects.update(booted(db, 2))
    for guard in (Require(db), Update(booted(db, 3)), Remove(db)):
        with pytest.raises(Refused) as caught:
            await objects.commit([Update(booted(web, 2)), Create(task(web)), guard])
        assert caught.value.code == "stale"
        assert "'db'" in caught.value.message
    assert await objects.get(Vm, web.meta.id) == web
    assert (await objects.list(Task)).items == ()


async def test_a_commit_returns_what_it_wrote(objects: Objects) -> None:
    web, db = await objects.create(vm("web"), vm("db"))
    about = task(web)
    written = await objects.commit([Require(db), Update(booted(web, 2)), Create(about)])
    assert [one.meta.revision for one in written] == [2, 2]
    assert written == (await objects.get(Vm, web.meta.id), await objects.get(Task, about.meta.id))
    assert await objects.get(Vm, db.meta.id) == db


async def test_a_watch_tells_what_was_and_what_is_in_whole_transactions(objects: Objects) -> None:
    (web,) = await objects.create(vm("web"))
    about = task(web)
    await objects.commit([Update(booted(web, 2)), Create(about)])
    await objects.create(Flavor(meta=Meta(id="f", name="f"), spec=FlavorSpec(memory=1)))
    await objects.delete(await objects.get(Vm, web.meta.id))
    async with aclosing(objects.watch(Vm, Task, from_revision=2)) as batches:
        changed, removed = await anext(batches), await anext(batches)
    assert [(c.kind, c.id) for c in changed.changes] == [("vm", web.meta.id), ("task", about.meta.id)]
    before, after = changed.changes[0].previous, changed.changes[0].object
    assert before == web
    assert isinstance(after, Vm)
    assert (after.spec.boots, after.meta.revision) == (2, 2)
    assert changed.changes[1].previous is None
    assert (removed.revision, removed.changes[0].object) == (4, None)
    assert removed.changes[0].previous == after


async def test_a_watch_of_one_kind_ignores_the_others(objects: Objects) -> None:
    async with aclosing(objects.watch(Flavor, from_revision=1)) as batches:
        await objects.create(vm("web"))
        await objects.create(Flavor(meta=Meta(id="f", name="f"), spec=FlavorSpec(memory=1)))
        batch = await anext(batches)
    assert [change.kind for change in batch.changes] == ["flavor"]


async def test_a_watch_from_a_forgotten_revision_is_lost(objects: Objects) -> None:
    (web,) = await objects.create(vm("web"))
    for number in range(2, 200):
        web = await objects.update(booted(web, number))
    with pytest.raises(WatchLost):
        await anext(objects.watch(Vm, from_revision=2))


async def test_what_is_read_is_what_is_recorded_not_what_was_passed(objects: Objects) -> None:
    made = vm("web")
    made = msgspec.structs.replace(made, status=msgspec.structs.replace(made.status, details={"list": (1, 2)}))
    await objects.create(made)
    assert (await objects.get(Vm, made.meta.id)).status.details == {"list": [1, 2]}


async def test_the_same_record_is_decoded_once(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    first = await objects.get(Vm, made.meta.id)
    assert (await objects.list(Vm)).items[0] is first
    await objects.update(booted(first, 2))
    assert (await objects.get(Vm, made.meta.id)).spec.boots == 2


async def test_what_is_gone_is_not_kept_decoded_whoever_is_behind(objects: Objects) -> None:
    (made,) = await objects.create(vm("web"))
    (other,) = await objects.create(vm("other"))
    changed = await objects.update(booted(made, 1))
    assert len((await objects.list(Vm)).items) == 2
    await objects.commit([Remove(changed)])
    assert set(objects._cache) == {f"/vms/{other.meta.id}"}
    async with aclosing(objects.watch(Vm, from_revision=1)) as batches:
        seen = [(await anext(batches)).changes[0].object for _ in range(4)]
    assert [one is None for one in seen] == [False, False, False, True]
    assert set(objects._cache) == {f"/vms/{other.meta.id}"}


async def test_a_record_that_cannot_be_read_is_named(objects: Objects) -> None:
    await objects.store.txn([], [Put("/vms/odd", b'{"meta":{"id":"odd","name":"x"},"colour":1}')])
    with pytest.raises(CorralError, match="/vms/odd") as caught:
        await objects.get(Vm, "odd")
    assert "newer" in caught.value.hint
