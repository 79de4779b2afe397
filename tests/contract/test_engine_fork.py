"""One contract for both engines: freezing a machine, and forking others from it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from corral.engine.protocol import Card, Drive, HostForward, Limits, Machine, Sighting, State, Template
from corral.errors import CorralError, Invalid, NotFound, Refused, Unavailable
from corral.runtime import Runtime, process
from tests.contract.test_engine import REAL, FakeHost, Host, RealHost, free_port

CARD = Card(name="net0", mac="52:54:00:00:00:01", hostname="tiny")


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.skipif(not REAL, reason="QEMU is not here"))])
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    root = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    root.chmod(0o711)
    made: Host = (FakeHost if request.param == "fake" else RealHost)(root, Runtime())
    yield made
    for seen in await made.engine.inventory():
        await made.engine.kill(seen.id)
        await made.engine.remove(seen.id)
    for template in await made.engine.templates():
        await made.engine.discard(template.id)
    await made.close()
    assert [path for path in (root / "templates").glob("*") if path.is_dir()] == []
    shutil.rmtree(root)


def overlay(host: Host, machine: Machine, under: Drive, name: str) -> Drive:
    """A fresh disk over ``under`` in the directory of ``machine``."""
    path = host.root / "vms" / machine.id / name
    path.parent.mkdir(mode=0o711, exist_ok=True)
    base = under.chain[0]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", base.format, "-b", str(base.path), str(path), "1M"]
    if base.path.exists():
        subprocess.run(command, check=True)
    return msgspec.structs.replace(under, path=path, format="qcow2", layers=under.chain)


async def frozen(host: Host, machine: Machine, id: str | None = None) -> tuple[Template, Machine]:
    """A template of ``machine``, and the machine as it is then."""
    id = id or host.rt.random.id()
    drives = tuple(overlay(host, machine, drive, f"{drive.name}-{id}.qcow2") for drive in machine.drives)
    template = await host.engine.freeze(machine.id, id, {drive.name: drive for drive in drives})
    return template, msgspec.structs.replace(machine, drives=drives)


def fork_of(host: Host, of: Template, **more: object) -> Machine:
    """A machine that is to be forked from the template, with a disk of its own."""
    child = msgspec.structs.replace(of.machine, id=host.rt.random.id(), name="child", template=of.id)
    drives = tuple(overlay(host, child, drive, f"{drive.name}.qcow2") for drive in child.drives)
    return msgspec.structs.replace(child, drives=drives, **more)


async def test_a_machine_without_a_disk_is_frozen_and_forked_too(host: Host) -> None:
    parent = await host.started(drives=())
    template, _ = await frozen(host, parent)
    assert (await host.engine.create(fork_of(host, template))).state is State.CREATED
    again, _ = await frozen(host, parent)
    assert {one.id for one in await host.engine.templates()} == {template.id, again.id}


async def test_a_fork_starts_where_its_template_stood_and_the_parent_goes_on(host: Host) -> None:
    parent = await host.started(cards=(CARD,))
    before = await host.engine.inspect(parent.id)
    template, now = await frozen(host, parent)
    assert await host.engine.drives(parent.id) == now.drives
    after = await host.engine.inspect(parent.id)
    assert (after.state, after.pid, after.template) == (State.RUNNING, before.pid, None)
    assert template.pause_s is not None
    assert (template.stale, template.loaded, template.memory >= parent.memory) == ("", True, True)
    assert len(template.digest) == 64
    child = fork_of(host, template)
    made = await host.engine.create(child)
    assert (made.state, made.template) == (State.CREATED, template.id)
    await host.engine.resume(child.id)
    await host.engine.link(child.id, "net0", True)
    assert (await host.engine.inspect(child.id)).state is State.RUNNING
    assert (await host.engine.create(child)).pid == made.pid


async def test_many_forks_and_forks_of_forks(host: Host) -> None:
    parent = await host.started()
    first, _ = await frozen(host, parent)
    children = [fork_of(host, first) for _ in range(3)]
    await asyncio.gather(*(host.engine.create(child) for child in children))
    await host.engine.resume(children[0].id)
    second, _ = await frozen(host, children[0])
    grandchild = fork_of(host, second)
    assert (await host.engine.create(grandchild)).state is State.CREATED
    await host.engine.resume(grandchild.id)
    assert len(grandchild.drives[0].layers) == len(parent.drives[0].layers) + 2
    assert {one.id for one in await host.engine.templates()} == {first.id, second.id}


async def test_freezing_again_under_the_same_id_returns_what_was_made(host: Host) -> None:
    parent = await host.started()
    template, now = await frozen(host, parent)
    again = await host.engine.freeze(parent.id, template.id, {})
    assert again == template
    other, _ = await frozen(host, now)
    assert other.id != template.id
    assert len(other.machine.drives[0].layers) == 1


async def test_templates_outlive_the_daemon_and_the_machine(host: Host) -> None:
    parent = await host.started()
    template, _ = await frozen(host, parent)
    await host.engine.kill(parent.id)
    await host.engine.remove(parent.id)
    shutil.rmtree(host.root / "vms" / parent.id, ignore_errors=True)
    await host.restart()  # in good order, and no machine is left: its memory is on disk only
    (kept,) = await host.engine.templates()
    assert msgspec.structs.replace(kept, loaded=template.loaded) == template
    child = fork_of(host, template)
    await host.engine.create(child)
    await host.engine.resume(child.id)


async def test_a_template_in_use_is_not_discarded(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    child = fork_of(host, template)
    await host.engine.create(child)
    with pytest.raises(Refused) as caught:
        await host.engine.discard(template.id)
    assert caught.value.code == "in-use"
    await host.engine.kill(child.id)
    await host.engine.discard(template.id)
    await host.engine.discard(template.id)
    assert await host.engine.templates() == []


async def test_a_fork_with_other_hardware_or_of_nothing_is_refused(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    wrong: list[tuple[dict[str, object], str]] = [
        ({"memory": template.machine.memory * 2}, "unsupported"),
        ({"cpus": 2}, "unsupported"),
        ({"cards": (CARD,)}, "unsupported"),
        ({"template": host.rt.random.id()}, "not-found"),
    ]
    for change, code in wrong:
        child = fork_of(host, template, **change)
        with pytest.raises(CorralError) as caught:
            await host.engine.create(child)
        assert (caught.value.code, caught.value.field) == (code, "template")
        assert (await host.engine.inspect(child.id)).state is State.ABSENT


async def test_names_addresses_ports_and_limits_are_not_hardware(host: Host) -> None:
    one = host.machine(cards=(CARD,))
    other = host.machine(cards=(Card(name="net0", mac="52:54:00:00:00:02", hostname="other"),), name="other", epoch=3)
    limited = tuple(msgspec.structs.replace(drive, limits=Limits(iops=100)) for drive in other.drives)
    other = msgspec.structs.replace(other, drives=limited)
    assert await host.engine.hardware(one) == await host.engine.hardware(other)
    for change in ({"cpus": 2}, {"memory": 128 << 20}, {"cpu_model": "max"}, {"cards": ()}):
        assert await host.engine.hardware(one) != await host.engine.hardware(msgspec.structs.replace(one, **change))


async def test_a_stale_template_is_named_and_never_used(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    spoil(host, template)
    (seen,) = await host.engine.templates()
    assert seen.stale
    with pytest.raises(Refused) as caught:
        await host.engine.create(fork_of(host, template))
    assert (caught.value.code, caught.value.field) == ("stale", "template")
    await host.engine.discard(template.id)


def spoil(host: Host, template: Template) -> None:
    """Its hardware is of another hypervisor."""
    if isinstance(host, FakeHost):
        host.world.templates.upgrade()
    else:
        record = host.root / "templates" / template.id / "template.json"
        record.write_text(record.read_text().replace(template.hardware, "0" * 64))


async def test_only_a_running_machine_with_an_overlay_for_each_disk_is_frozen(host: Host) -> None:
    machine = host.machine()
    with pytest.raises(Refused) as caught:
        await frozen(host, machine)
    assert caught.value.code == "wrong-phase"
    await host.engine.create(machine)
    with pytest.raises(Refused) as caught:
        await frozen(host, machine)
    assert caught.value.code == "wrong-phase"
    await host.engine.resume(machine.id)
    with pytest.raises(Invalid, match="'root' has no overlay"):
        await host.engine.freeze(machine.id, host.rt.random.id(), {})
    root = overlay(host, machine, machine.drives[0], "new.qcow2")
    wrong = {
        "is no drive": {"root": root, "data": root},
        "no qcow2 over": {"root": msgspec.structs.replace(root, layers=())},
        "another drive": {"root": msgspec.structs.replace(root, bootable=False)},
    }
    for words, overlays in wrong.items():
        with pytest.raises(Invalid, match=words):
            await host.engine.freeze(machine.id, host.rt.random.id(), overlays)
    assert await host.engine.templates() == []
    assert (await host.engine.inspect(machine.id)).state is State.RUNNING


async def test_a_cable_is_plugged_into_a_card_that_exists(host: Host) -> None:
    machine = await host.started(cards=(CARD,))
    await host.engine.link(machine.id, "net0", False)
    await host.engine.link(machine.id, "net0", True)
    with pytest.raises(NotFound):
        await host.engine.link(machine.id, "net7", True)


def lives(host: Host, seen: Sighting) -> bool:
    if isinstance(host, FakeHost):
        return any(one.pid == seen.pid and one.alive for one in host.world.machines.values())
    assert seen.pid is not None
    return process.stat(seen.pid) is not None


def crash(host: Host, seen: Sighting) -> None:
    if isinstance(host, FakeHost):
        host.world.crash(seen.id)
    else:
        assert seen.pid is not None
        os.kill(seen.pid, signal.SIGKILL)


def silence(host: Host, seen: Sighting) -> None:
    if isinstance(host, FakeHost):
        host.world.hang(seen.id)
    else:
        assert seen.pid is not None
        os.kill(seen.pid, signal.SIGSTOP)


async def warmed(host: Host, template: Template, **more: object) -> Machine:
    """A machine that is nobody's yet, as its VM will want it."""
    wanted = fork_of(host, template, **more)
    cards = tuple(msgspec.structs.replace(card, hostname="", forwards=()) for card in wanted.cards)
    await host.engine.warm(msgspec.structs.replace(wanted, name="warm", cards=cards))
    return wanted


async def test_a_warm_machine_is_nobodys_until_it_is_taken(host: Host) -> None:
    template, _ = await frozen(host, await host.started(cards=(CARD,)))
    wanted = await warmed(host, template)
    (ready,) = await host.engine.pool()
    assert (ready.id, ready.state, ready.template) == (wanted.id, State.CREATED, template.id)
    assert (await host.engine.inspect(wanted.id)).state is State.ABSENT
    assert wanted.id not in {seen.id for seen in await host.engine.inventory()}
    for call in (host.engine.resume, host.engine.pause, host.engine.stats):
        with pytest.raises(Refused) as caught:
            await call(wanted.id)
        assert caught.value.code == "wrong-phase"
    forward = HostForward(protocol="tcp", address="127.0.0.1", host=free_port(), guest=22)
    card = msgspec.structs.replace(wanted.cards[0], forwards=(forward,))
    limited = tuple(msgspec.structs.replace(drive, limits=Limits(iops=100)) for drive in wanted.drives)
    wanted = msgspec.structs.replace(wanted, name="web", epoch=7, cards=(card,), drives=limited)
    taken = await host.engine.create(wanted, warm=True)
    assert (taken.state, taken.pid, taken.epoch, taken.forwards) == (State.CREATED, ready.pid, 7, (forward,))
    assert await host.engine.pool() == []
    assert (await host.engine.create(wanted, warm=True)).pid == ready.pid
    await host.engine.resume(wanted.id)
    await host.restart()
    seen = await host.engine.inspect(wanted.id)
    assert (seen.state, seen.pid, seen.epoch, seen.template) == (State.RUNNING, ready.pid, 7, template.id)


async def test_a_warm_machine_that_rehearses_runs_meanwhile_and_stands_still_again(host: Host) -> None:
    template, _ = await frozen(host, await host.started(cards=(CARD,)))
    wanted, seen = fork_of(host, template), list[Sighting]()

    async def look() -> None:
        seen.extend(await host.engine.pool())

    ready = await host.engine.warm(wanted, look)
    assert [(one.pid, one.state) for one in seen] == [(ready.pid, State.RUNNING)]
    assert [(one.pid, one.state) for one in await host.engine.pool()] == [(ready.pid, State.CREATED)]
    assert (await host.engine.inspect(wanted.id)).state is State.ABSENT
    taken = await host.engine.create(wanted, warm=True)
    assert (taken.pid, taken.state) == (ready.pid, State.CREATED)
    await host.engine.resume(wanted.id)
    assert (await host.engine.inspect(wanted.id)).state is State.RUNNING


async def test_a_warm_machine_whose_rehearsal_failed_is_never_taken(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    wanted = fork_of(host, template)

    async def fail() -> None:
        raise Unavailable("nobody answers", code="unresponsive")

    with pytest.raises(Unavailable):
        await host.engine.warm(wanted, fail)
    (left,) = await host.engine.pool()
    made = await host.engine.create(wanted, warm=True)
    assert (made.state, made.pid == left.pid) == (State.CREATED, False)
    assert not lives(host, left)


async def test_what_a_warm_machine_cannot_become_is_started_in_its_place(host: Host) -> None:
    template, _ = await frozen(host, await host.started(cards=(CARD,)))
    other = Card(name="net0", mac="52:54:00:00:00:09", hostname="tiny")
    for change, asked in (({"cards": (other,)}, True), ({}, False)):
        wanted = await warmed(host, template)
        (ready,) = await host.engine.pool()
        made = await host.engine.create(msgspec.structs.replace(wanted, **change), warm=asked)
        assert made.state is State.CREATED
        assert made.pid not in (None, ready.pid)
        assert await host.engine.pool() == []
        assert not lives(host, ready)


async def test_a_warm_machine_that_died_or_fell_silent_is_noticed_when_it_is_wanted(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    for break_it in (crash, silence):
        wanted = await warmed(host, template)
        (ready,) = await host.engine.pool()
        break_it(host, ready)
        made = await host.engine.create(wanted, warm=True)
        assert made.state is State.CREATED
        assert made.pid not in (None, ready.pid)
        await host.engine.resume(wanted.id)


async def test_a_port_that_is_taken_leaves_the_warm_machine_for_another_try(host: Host) -> None:
    template, _ = await frozen(host, await host.started(cards=(CARD,)))
    wanted = await warmed(host, template)
    (ready,) = await host.engine.pool()
    forward = HostForward(protocol="tcp", address="127.0.0.1", host=free_port(), guest=22)
    card = msgspec.structs.replace(CARD, forwards=(forward,))
    other = await host.started(cards=(card,))
    assert (await host.engine.inspect(other.id)).forwards == (forward,)
    with pytest.raises(Refused) as caught:
        await host.engine.create(msgspec.structs.replace(wanted, cards=(card,)), warm=True)
    assert (caught.value.code, caught.value.field) == ("in-use", "ports")
    assert (await host.engine.create(wanted, warm=True)).pid == ready.pid


async def test_a_template_that_ends_or_is_stale_takes_its_warm_machines_along(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    await warmed(host, template)
    (ready,) = await host.engine.pool()
    await host.engine.discard(template.id)
    assert await host.engine.pool() == []
    assert not lives(host, ready)
    template, _ = await frozen(host, await host.started())
    wanted = await warmed(host, template)
    spoil(host, template)
    with pytest.raises(Refused) as caught:
        await host.engine.create(wanted, warm=True)
    assert caught.value.code == "stale"
    assert (await host.engine.inspect(wanted.id)).state is State.ABSENT


async def test_warm_machines_are_found_and_ended_by_the_next_daemon(host: Host) -> None:
    template, _ = await frozen(host, await host.started())
    wanted = await warmed(host, template)
    (ready,) = await host.engine.pool()
    await host.restart()
    assert [seen.id for seen in await host.engine.pool()] == [wanted.id]
    await host.engine.warm(wanted)  # what is there already is left alone
    assert [seen.pid for seen in await host.engine.pool()] == [ready.pid]
    await host.engine.remove(wanted.id)
    assert await host.engine.pool() == []
    assert not lives(host, ready)


async def test_only_a_fork_without_ports_is_made_ahead(host: Host) -> None:
    with pytest.raises(Refused) as caught:
        await host.engine.warm(host.machine())
    assert caught.value.code == "unsupported"
    running = await host.started()
    template, _ = await frozen(host, running)
    with pytest.raises(Refused) as caught:
        await host.engine.warm(msgspec.structs.replace(fork_of(host, template), id=running.id))
    assert caught.value.code == "in-use"
