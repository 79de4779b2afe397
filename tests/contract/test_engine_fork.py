"""One contract for both engines: freezing a machine, and forking others from it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from corral.engine.protocol import Card, Drive, Limits, Machine, State, Template
from corral.errors import CorralError, Invalid, NotFound, Refused
from corral.runtime import Runtime
from tests.contract.test_engine import REAL, FakeHost, Host, RealHost

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


async def test_a_fork_starts_where_its_template_stood_and_the_parent_goes_on(host: Host) -> None:
    parent = await host.started(cards=(CARD,))
    before = await host.engine.inspect(parent.id)
    template, _ = await frozen(host, parent)
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
