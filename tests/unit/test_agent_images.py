"""Images on their way in and out; the host's record; the collector; the agent as the API sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from corral.agent.doctor import examine
from corral.agent.enforcement import enforcement
from corral.agent.live import AgentLive
from corral.controllers.collect import Collector
from corral.engine.protocol import Capabilities, Probe
from corral.errors import CorralError, NotFound, Refused, Unavailable
from corral.guest.frames import Frame, Type
from corral.guest.process import ResidentProcess
from corral.guest.protocol import Command, Ended, Output
from corral.host.cgroup.v1 import GroupsV1
from corral.images.builds import Builds
from corral.model import (
    Event,
    EventSpec,
    Host,
    Image,
    ImagePhase,
    ImageSpec,
    Meta,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)  # fmt: skip
from corral.runtime import Runtime
from corral.store.objects import Create
from tests.unit.stage import DIGEST, FakeFacts, Stage, on_stage, vm_id


async def order(stage: Stage, name: str, deadline_s: float = 600.0, **spec: Any) -> Image:
    """An image with its task, as the API writes them."""
    image = Image(meta=Meta(id=f"image-{name}", name=name, created=stage.rt.clock.now()), spec=ImageSpec(**spec))
    made, _ = await stage.objects.commit([Create(image), Create(stage.task("fetch", image, deadline_s))])
    assert isinstance(made, Image)
    return made


def test_an_image_is_built_with_progress_and_then_ready() -> None:
    async def test(stage: Stage) -> None:
        async def work(progress: Any) -> None:
            for n in range(10):
                progress("downloading", n, 10)
                await asyncio.sleep(1)

        stage.images.work = work
        await order(stage, "new", source="build", recipe="micro")
        await asyncio.sleep(5)
        task = await stage.objects.get(Task, "task-fetch-new-1")
        assert task.status.steps[-1].name == "downloading"
        assert task.status.progress == pytest.approx(0.4, abs=0.2)
        assert (await stage.objects.get(Image, "image-new")).status.phase is ImagePhase.BUILDING
        done = await stage.done("task-fetch-new-1")
        assert done.status.state is TaskState.DONE
        image = await stage.objects.get(Image, "image-new")
        assert (image.status.phase, image.status.digest, image.status.host) == ("ready", "b" * 64, "here")
        assert image.status.received == 9

    on_stage(test)


def test_an_image_whose_recipe_has_changed_is_built_again() -> None:
    async def test(stage: Stage) -> None:
        stage.images.today = "first"
        await order(stage, "new", source="build", recipe="micro")
        await stage.done("task-fetch-new-1")
        old = await stage.objects.get(Image, "image-new")
        assert old.status.recipe == "first"
        await stage.stop()
        stage.images.today, stage.images.made = "second", "c" * 64
        await stage.start()
        await asyncio.sleep(5)
        image = await stage.objects.get(Image, "image-new")
        assert (image.status.phase, image.status.digest, image.status.recipe) == ("ready", "c" * 64, "second")
        assert old.status.digest not in stage.images.inventory()
        assert "Rebuilt" in await stage.events()
        assert "Outdated" not in await stage.events()

    on_stage(test)


def test_an_outdated_image_that_vms_have_under_their_disks_is_told_of_and_waits_for_their_end() -> None:
    async def test(stage: Stage) -> None:
        await order(stage, "new", source="build", recipe="debian")
        await stage.done("task-fetch-new-1")
        await stage.launch(image="new", image_id="image-new")
        await stage.phase("running")
        await stage.done(await stage.ask("stop", force=True))
        stage.images.today, stage.images.made = "second", "c" * 64
        await stage.stop()
        await stage.start()
        await asyncio.sleep(5)
        image = await stage.objects.get(Image, "image-new")
        assert (image.status.phase, image.status.digest) == ("ready", "b" * 64)
        assert "has changed since it was built; it is built again when web no longer need it" in image.status.reason
        assert "Outdated" in await stage.events()
        await stage.done(await stage.ask("start"))  # with what it has under its disk
        await stage.done(await stage.ask("delete", force=True))
        await asyncio.sleep(70)
        image = await stage.objects.get(Image, "image-new")
        assert (image.status.digest, image.status.reason) == ("c" * 64, "")

    on_stage(test)


def test_an_outdated_image_that_cannot_be_built_again_stays_in_use() -> None:
    async def test(stage: Stage) -> None:
        await order(stage, "new", source="build", recipe="micro")
        await stage.done("task-fetch-new-1")

        async def work(progress: Any) -> None:
            raise Unavailable("the mirror does not answer")

        stage.images.today, stage.images.work = "second", work
        await stage.stop()
        await stage.start()
        await stage.launch(image="new", image_id="image-new")
        await stage.phase("running")
        image = await stage.objects.get(Image, "image-new")
        assert (image.status.phase, image.status.digest) == ("ready", "b" * 64)
        assert "could not be built again: the mirror does not answer" in image.status.reason

    on_stage(test)


def test_a_vm_that_starts_while_its_image_is_built_again_keeps_what_it_started_with() -> None:
    async def test(stage: Stage) -> None:
        await stage.objects.delete(await stage.objects.get(Image, "image-img"))
        await order(stage, "new", source="build", recipe="debian")
        await stage.done("task-fetch-new-1")

        async def work(progress: Any) -> None:
            await asyncio.sleep(60)

        stage.images.today, stage.images.made, stage.images.work = "second", "c" * 64, work
        await stage.stop()
        await stage.start()
        await stage.launch(image="new", image_id="image-new")
        await stage.phase("running", limit=30)
        await asyncio.sleep(140)
        image = await stage.objects.get(Image, "image-new")
        assert (image.status.phase, image.status.digest) == ("ready", "b" * 64)
        assert "when web no longer" in image.status.reason
        assert "c" * 64 not in stage.images.inventory()

    on_stage(test)


def test_a_vm_waits_for_its_image_and_then_starts() -> None:
    async def test(stage: Stage) -> None:
        async def work(progress: Any) -> None:
            await asyncio.sleep(20)

        stage.images.work = work
        await order(stage, "new", source="catalogue", recipe="debian-13")
        await stage.launch(image="new", image_id="image-new")
        await stage.until("told", lambda vm: "waits for its image new" in vm.status.reason)
        assert (await stage.done("task-launch-web-1")).status.state is TaskState.DONE

    on_stage(test)


def test_a_failed_fetch_is_an_error_with_its_reason() -> None:
    async def test(stage: Stage) -> None:
        async def work(progress: Any) -> None:
            raise Unavailable("the server said 404", hint="check the address")

        stage.images.work = work
        await order(stage, "new", source="url", url="https://example.org/x")
        task = await stage.done("task-fetch-new-1")
        assert task.status.error is not None
        assert task.status.error["detail"] == "the server said 404"
        image = await stage.objects.get(Image, "image-new")
        assert image.status.phase is ImagePhase.ERROR
        assert "404" in image.status.reason

    on_stage(test)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_fetch_can_be_cancelled_and_has_a_deadline(how: str) -> None:
    async def test(stage: Stage) -> None:
        ended: list[bool] = []

        async def work(progress: Any) -> None:
            try:
                await asyncio.sleep(1e6)
            finally:
                ended.append(True)

        stage.images.work = work
        await order(stage, "new", deadline_s=600 if how == "cancel" else 30, source="catalogue", recipe="debian-13")
        await asyncio.sleep(2)
        if how == "cancel":
            await stage.objects.change(
                Task, "task-fetch-new-1",
                lambda t: msgspec.structs.replace(t, spec=msgspec.structs.replace(t.spec, cancel=True)),
            )  # fmt: skip
        task = await stage.done("task-fetch-new-1")
        assert task.status.state is (TaskState.CANCELLED if how == "cancel" else TaskState.FAILED)
        assert ended == [True]
        assert (await stage.objects.get(Image, "image-new")).status.phase is ImagePhase.ERROR

    on_stage(test)


def test_a_fetch_goes_on_after_the_agent_died() -> None:
    async def test(stage: Stage) -> None:
        started: list[float] = []

        async def work(progress: Any) -> None:
            started.append(stage.rt.clock.monotonic())
            await asyncio.sleep(10)

        stage.images.work = work
        await order(stage, "new", source="build", recipe="micro")
        await asyncio.sleep(5)
        await stage.stop()
        await stage.start()
        assert (await stage.done("task-fetch-new-1")).status.state is TaskState.DONE
        assert len(started) == 2

    on_stage(test)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def test_an_upload_is_taken_once_and_accepted() -> None:
    async def test(stage: Stage) -> None:
        live = AgentLive(stage.agent, Path("/"))
        await order(stage, "mine", source="upload", format="qcow2")
        await asyncio.sleep(5)
        assert (await stage.objects.get(Image, "image-mine")).status.phase is ImagePhase.PENDING
        await live.receive("image-mine", chunks(b"ab", b"cd"), 4)
        assert stage.images.received["image-mine"] == b"abcd"
        assert (await stage.done("task-fetch-mine-1")).status.state is TaskState.DONE
        with pytest.raises(Refused) as caught:
            await live.receive("image-mine", chunks(b"again"), None)
        assert caught.value.code == "wrong-phase"

    on_stage(test)


def test_a_deleted_image_takes_its_files_along_unless_another_has_them() -> None:
    async def test(stage: Stage) -> None:
        await stage.image("twin")
        for name, left in (("img", True), ("twin", False)):
            await stage.objects.change(
                Image, f"image-{name}",
                lambda i: msgspec.structs.replace(i, meta=msgspec.structs.replace(i.meta, deleted=stage.rt.clock.now())),
            )  # fmt: skip
            await asyncio.sleep(2)
            with pytest.raises(NotFound):
                await stage.objects.get(Image, f"image-{name}")
            assert (DIGEST in stage.images.stock) is left

    on_stage(test)


def test_an_image_whose_files_are_missing_says_so() -> None:
    async def test(stage: Stage) -> None:
        await stage.stop()
        stage.images.stock.clear()
        await stage.start()
        await asyncio.sleep(2)
        image = await stage.objects.get(Image, "image-img")
        assert image.status.phase is ImagePhase.ERROR
        assert "missing" in image.status.reason

    on_stage(test)


def test_the_host_registers_itself_and_is_written_only_when_it_changes() -> None:
    async def test(stage: Stage) -> None:
        host = await stage.objects.get(Host, "host-1")
        assert (host.meta.name, host.status.phase, host.status.accelerator) == ("here", "ready", "tcg")
        assert host.status.memory_reserved > 0
        stage.facts = stage.facts._replace(disk_free=stage.facts.disk_free - 1000)
        await asyncio.sleep(1000)
        assert (await stage.objects.get(Host, "host-1")).meta.revision == host.meta.revision
        stage.facts = stage.facts._replace(kernel="6.2")
        await asyncio.sleep(1000)
        assert (await stage.objects.get(Host, "host-1")).status.kernel == "6.2"

    on_stage(test)


def test_a_program_runs_in_a_guest_that_answers_and_is_refused_otherwise() -> None:
    async def test(stage: Stage) -> None:
        live = AgentLive(stage.agent, Path("/"))
        with pytest.raises(NotFound):
            await live.run(vm_id(), Command(argv=("true",)))
        await stage.launch()
        await stage.phase("starting")
        with pytest.raises(Unavailable) as caught:
            await live.run(vm_id(), Command(argv=("true",)))
        assert caught.value.code == "unresponsive"
        await stage.phase("running")
        process = await live.run(vm_id(), Command(argv=("echo", "hi")))
        assert [p async for p in process.output()] == [Output(stream=1, data=b"hi\n"), Ended(status=0)]
        assert (await live.guest_info(vm_id())).agent == "corral-guest"
        assert await live.serial_log(vm_id(), 4) == b"in: "
        await stage.done(await stage.ask("stop"))
        with pytest.raises(Refused) as refused:
            await live.run(vm_id(), Command(argv=("true",)))
        assert refused.value.code == "wrong-phase"
        assert refused.value.hint == "corral start web"

    on_stage(test)


def test_the_doctor_says_what_is_wrong_and_what_to_do() -> None:
    able = Capabilities(
        engine="QEMU 7.2", arch="x86_64", accelerator="tcg",
        probes=(
            Probe(name="kvm", works=False, reason="it opens, and then no guest runs"),
            Probe(name="tcg", works=True, reason="a tiny guest ran"),
        ),
    )  # fmt: skip
    checks = {c["name"]: c for c in examine(FakeFacts(), able, Path("/x"), which=lambda name: None)}
    assert checks["qemu"]["ok"] is True
    assert checks["kvm"]["ok"] == "warn"
    assert "no guest runs" in checks["kvm"]["message"]
    assert checks["tcg"]["ok"] is True
    assert checks["accelerator"]["ok"] == "warn"
    assert checks["qemu-img"]["ok"] is False
    assert checks["qemu-img"]["hint"]
    assert checks["memory"]["ok"] is True
    low = {c["name"]: c for c in examine(FakeFacts(disk_free=1 << 20), None, Path("/x"), problem="no QEMU")}
    assert low["disk"]["ok"] is False
    assert low["qemu"] == {"name": "qemu", "ok": False, "message": "no QEMU", "hint": low["qemu"]["hint"]}


def test_the_doctor_and_the_host_say_how_limits_hold_and_what_is_missing() -> None:
    async def test(stage: Stage) -> None:
        (host,) = (await stage.objects.list(Host)).items
        assert set(host.status.limits) == {"cpu", "memory", "disk", "nic"}
        assert "no control groups" in host.status.limits["cpu"]
        assert "neither limit" in host.status.limits["nic"]
        checks = {c["name"]: c for c in await AgentLive(stage.agent, Path("/")).doctor()}
        assert (checks["cpu limits"]["ok"], checks["cpu limits"]["message"]) == ("warn", host.status.limits["cpu"])
        assert (checks["disk limits"]["ok"], checks["disk limits"]["message"]) == (True, host.status.limits["disk"])

    on_stage(test)


def test_without_a_memory_controller_that_is_said(tmp_path: Path) -> None:
    for name in ("cpu", "cpuacct"):
        (tmp_path / name).mkdir()
    groups = GroupsV1({name: tmp_path / name for name in ("cpu", "cpuacct")}, "c", 2)
    found = {one.resource: one for one in enforcement(groups)}
    assert (found["cpu"].whole, found["memory"].whole) == (True, False)
    assert "no memory controller" in found["memory"].how


def test_the_collector_bounds_events_and_tasks_and_ends_what_nobody_ends() -> None:
    async def test(stage: Stage) -> None:
        await stage.stop()
        now = stage.rt.clock.now()
        for n in range(30):
            spec = TaskSpec(verb="start", target_kind="vm", target_id="nobody", deadline_s=10.0)
            status = TaskStatus(state=TaskState.DONE, ended=now + n) if n else TaskStatus()
            await stage.objects.create(Task(meta=Meta(id=f"t{n}", name=f"t{n}", created=now), spec=spec, status=status))
        before = len((await stage.objects.list(Event)).items)
        for n in range(30):
            what = EventSpec(about_kind="vm", about_id="x", reason="R", at=now + n)
            await stage.objects.create(Event(meta=Meta(id=f"e{n}", name=f"e{n}", created=now), spec=what))
        await asyncio.sleep(60)
        await Collector(stage.objects, stage.rt, events=10, tasks=5).once()
        tasks = {t.meta.id: t for t in (await stage.objects.list(Task)).items}
        assert tasks["t0"].status.state is TaskState.FAILED
        assert tasks["t0"].status.error is not None
        assert tasks["t0"].status.error["code"] == "timed-out"
        assert sorted(tasks) == ["t0", "t25", "t26", "t27", "t28", "t29"]
        events = [e.spec.at for e in (await stage.objects.list(Event)).items]
        assert len(events) == 10 < before + 30
        assert min(events) == now + 20
        await stage.start()

    on_stage(test)


def test_a_recipe_is_another_when_the_guest_agent_is(tmp_path: Path) -> None:
    agent = tmp_path / "corral-guest-x86_64"

    def today(recipe: str = "micro") -> str:
        builds = Builds(tmp_path / "cache", tmp_path, None, Runtime())  # type: ignore[arg-type]
        return builds.digest(recipe, "x86_64")

    assert today() == "", "nothing can be built without it"
    agent.write_bytes(b"one")
    first = today()
    assert len(first) == 64
    assert first == today()
    assert first != today("debian")
    assert today("other") == ""
    agent.write_bytes(b"two")
    assert today() != first


async def test_a_guest_agent_that_is_too_old_for_a_request_is_told_so() -> None:
    class NoLink:
        lost = None

        def send(self, type_: Type, channel: int, payload: bytes = b"") -> None: ...

    program = ResidentProcess(NoLink(), 1)
    program.handle(Frame(Type.FAILED, 1, b"\x7ea string has a NUL in it"))
    with pytest.raises(CorralError, match="older than this Corral") as caught:
        await program.started()
    assert "built again" in caught.value.hint
