"""Sandboxes from Python, both ways: what a program in one may take, and that nothing is left. On the fake engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

import corral
import corral.sync
from corral.errors import CorralError, NotFound, TimedOut
from tests.integration.platform import Platform, wait_until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def client(shared: Platform) -> Iterator[corral.sync.Client]:
    with corral.sync.connect(state=shared.state) as one:
        yield one


@pytest.fixture
async def aclient(shared: Platform) -> AsyncIterator[corral.AsyncClient]:
    async with corral.connect(state=shared.state) as one:
        yield one


def nothing_left(platform: Platform, seconds: float = 30) -> None:
    wait_until(lambda: platform.json("list") == [], seconds, "the sandbox to be gone")
    platform.assert_nothing_left()


def test_a_sandbox_has_no_network_is_never_restarted_and_gets_its_image(
    shared: Platform, client: corral.sync.Client
) -> None:
    with corral.sync.sandbox("micro", client=client, memory="128M", labels={"who": "me"}) as vm:
        seen = client.vms.get(vm.id)
        assert (seen.spec["nics"], seen.spec["restart"], seen.spec["ephemeral"]) == ([], "never", True)
        assert seen.labels == {"who": "me"}
        assert vm.run("sh", "-c", "exit 7").status == 7
    nothing_left(shared)


def test_an_error_in_the_block_passes_and_nothing_is_left(shared: Platform, client: corral.sync.Client) -> None:
    with pytest.raises(ZeroDivisionError), corral.sync.sandbox("micro", client=client):
        _ = 1 / 0
    nothing_left(shared)


def test_limits(client: corral.sync.Client) -> None:
    with corral.sync.sandbox("micro", client=client, max_output="1M") as vm:
        flooded = vm.run("cat", input=bytes(3 << 20))
        assert (flooded.status, len(flooded.stdout), flooded.limit) == (137, 1 << 20, "output")
        whole = vm.run("cat", input=bytes(3 << 20), max_output=None)
        assert (whole.status, len(whole.stdout), whole.limit) == (0, 3 << 20, "")
        with pytest.raises(TimedOut):
            vm.run("sleep", "infinity", timeout=0.5)
        with pytest.raises(CorralError) as caught:
            vm.run("false", check=True)
        assert caught.value.code == "guest"


def test_a_vm_that_goes_away_is_the_error(shared: Platform, client: corral.sync.Client) -> None:
    with corral.sync.sandbox("micro", client=client) as vm:
        threading.Timer(0.5, shared.run, ("delete", "--force", vm.name)).start()
        with pytest.raises(NotFound) as caught:
            vm.run("sleep", "infinity")
    assert f"{vm.name} was deleted" in caught.value.message


def test_an_unknown_image_is_refused(client: corral.sync.Client) -> None:
    with pytest.raises(NotFound), corral.sync.sandbox("nosuch", client=client):
        raise AssertionError("there is no such sandbox")


def test_a_killed_owner_leaves_nothing(shared: Platform) -> None:
    script = (
        "import corral.sync, sys, time\n"
        f"with corral.sync.connect(state={str(shared.state)!r}) as c, corral.sync.sandbox('micro', client=c):\n"
        "    print('in', flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"in\n"
    assert len(shared.json("list")) == 1
    owner.kill()
    owner.communicate()
    nothing_left(shared)


async def test_the_asynchronous_twin(shared: Platform, aclient: corral.AsyncClient) -> None:
    async with corral.sandbox("micro", client=aclient, max_output="1M") as vm:
        assert (await vm.run("sh", "-c", "exit 7")).status == 7
        flooded = await vm.run("cat", input=bytes(3 << 20))
        assert (flooded.status, len(flooded.stdout), flooded.limit) == (137, 1 << 20, "output")
        async with vm.stream("cat") as program:
            await program.write(b"there")
            piece = await program.read()
            assert piece is not None
            assert piece.data == b"there"
        with pytest.raises(CorralError):
            await vm.run("nothing-like-it")
        with pytest.raises(TimedOut):
            await vm.run("sleep", "infinity", timeout=0.5)
    nothing_left(shared)


async def test_the_asynchronous_twin_hears_that_its_vm_is_gone(shared: Platform, aclient: corral.AsyncClient) -> None:
    async with corral.sandbox("micro", client=aclient) as vm:
        threading.Timer(0.5, shared.run, ("delete", "--force", vm.name)).start()
        with pytest.raises(NotFound) as caught:
            await vm.run("sleep", "infinity")
        assert f"{vm.name} was deleted" in caught.value.message


async def test_a_cancelled_task_leaves_nothing(shared: Platform, aclient: corral.AsyncClient) -> None:
    inside = asyncio.Event()

    async def use() -> None:
        async with corral.sandbox("micro", client=aclient):
            inside.set()
            await asyncio.sleep(600)

    task = asyncio.create_task(use())
    await inside.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await asyncio.to_thread(nothing_left, shared)


async def test_many_at_once(shared: Platform, aclient: corral.AsyncClient) -> None:
    async def one(number: int) -> int:
        async with corral.sandbox("micro", client=aclient) as vm:
            return (await vm.run("sh", "-c", f"exit {number}")).status

    began = time.monotonic()
    assert await asyncio.gather(*[one(number) for number in range(20)]) == list(range(20))
    assert time.monotonic() - began < 60
    await asyncio.to_thread(nothing_left, shared)
