"""The pretended world behaves, and plays the faults that the simulator asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.engine.fake import FakeEngine, FakeWorld
from corral.engine.protocol import Drive, Machine, State
from corral.errors import CorralError, Unavailable
from corral.guest.fake import FakeConnector, FakeGuest
from corral.guest.protocol import Command, Ended, Output
from corral.runtime import Runtime, SeededRandom


class QuickClock:
    """Time that passes only by sleeping, at once."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return 1e9 + self.at

    def monotonic(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.at += seconds
        await asyncio.sleep(0)


@pytest.fixture
def rt() -> Runtime:
    return Runtime(clock=QuickClock(), random=SeededRandom(7))


@pytest.fixture
async def world(rt: Runtime) -> AsyncIterator[FakeWorld]:
    made = FakeWorld(rt)
    yield made
    await made.close()


async def booted(world: FakeWorld, rt: Runtime, path: Path | None = None) -> tuple[FakeEngine, str, FakeGuest]:
    engine, id = FakeEngine(world, rt), rt.random.id()
    drives = (Drive(name="root", path=path, format="raw"),) if path else ()
    await engine.create(Machine(id=id, name="web", memory=1 << 26, drives=drives))
    await engine.resume(id)
    channels = engine.channels(id)
    return engine, id, await FakeConnector(world)(channels.guest, channels.qga, rt)


async def say(guest: FakeGuest, *argv: str) -> tuple[bytes, int]:
    process = await guest.run(Command(argv=argv))
    pieces = [piece async for piece in process.output()]
    assert isinstance(pieces[-1], Ended)
    return b"".join(piece.data for piece in pieces if isinstance(piece, Output)), pieces[-1].status


async def test_a_guest_answers_when_it_has_booted(world: FakeWorld, rt: Runtime) -> None:
    engine, id = FakeEngine(world, rt), rt.random.id()
    await engine.create(Machine(id=id, name="web", memory=1 << 26))
    await rt.clock.sleep(100)
    assert not world.answers(id)
    await engine.resume(id)
    assert not world.answers(id)
    before = rt.clock.monotonic()
    guest = await FakeConnector(world)(engine.channels(id).guest, engine.channels(id).qga, rt)
    assert 1.0 <= rt.clock.monotonic() - before <= 3.2
    await guest.ping()
    assert (await guest.info()).hostname == "web"


async def test_programs_of_the_pretended_guest(world: FakeWorld, rt: Runtime) -> None:
    _, _, guest = await booted(world, rt)
    assert await say(guest, "true") == (b"", 0)
    assert await say(guest, "false") == (b"", 1)
    assert await say(guest, "echo", "a", "b") == (b"a b\n", 0)
    assert await say(guest, "sh", "-c", "exit 7") == (b"", 7)
    with pytest.raises(CorralError, match="No such file"):
        await guest.run(Command(argv=("vi",)))
    cat = await guest.run(Command(argv=("cat",)))
    await cat.write(b"x")
    await cat.eof()
    assert [piece async for piece in cat.output()] == [Output(stream=1, data=b"x"), Ended(status=0)]


async def test_a_guest_shuts_down_when_asked_and_its_connection_ends(world: FakeWorld, rt: Runtime) -> None:
    engine, id, guest = await booted(world, rt)
    await guest.shutdown()
    while (seen := await engine.inspect(id)).state is not State.EXITED:
        await rt.clock.sleep(0.1)
    assert seen.exit is not None
    assert seen.exit.reason == "guest-shutdown"
    with pytest.raises(Unavailable):
        await guest.ping()
    with pytest.raises(Unavailable):
        await FakeConnector(world)(engine.channels(id).guest, engine.channels(id).qga, rt)


async def test_after_a_reboot_it_takes_a_new_connection(world: FakeWorld, rt: Runtime) -> None:
    engine, id, guest = await booted(world, rt)
    world.reboot(id)
    await rt.clock.sleep(10)
    with pytest.raises(Unavailable):
        await guest.ping()
    again = await FakeConnector(world)(engine.channels(id).guest, engine.channels(id).qga, rt)
    await again.ping()


async def test_a_deaf_guest_ignores_the_power_button(world: FakeWorld, rt: Runtime) -> None:
    engine, id, guest = await booted(world, rt)
    world.deafen(id)
    with pytest.raises(Unavailable):
        await guest.ping()
    await engine.powerdown(id)
    await rt.clock.sleep(60)
    assert (await engine.inspect(id)).state is State.RUNNING
    world.deafen(id, False)
    await guest.ping()


async def test_a_crash_is_an_end_that_nobody_asked_for(world: FakeWorld, rt: Runtime) -> None:
    engine, id, _ = await booted(world, rt)
    world.crash(id)
    seen = await engine.inspect(id)
    assert seen.exit is not None
    assert (seen.state, seen.exit.asked, seen.exit.signal) == (State.EXITED, False, 11)


async def test_a_host_that_loses_power_loses_every_machine(world: FakeWorld, rt: Runtime) -> None:
    _, id, _ = await booted(world, rt)
    world.lose_power()
    seen = await FakeEngine(world, rt).inspect(id)
    assert seen.exit is not None
    assert seen.exit.reason == "host-reboot"


async def test_the_world_knows_who_writes_to_a_disk(world: FakeWorld, rt: Runtime) -> None:
    disk = Path("/disk")
    engine, first, _ = await booted(world, rt, disk)
    _, second, _ = await booted(world, rt, disk)
    assert world.writers(disk) == [first, second]
    await engine.kill(first)
    assert world.writers(disk) == [second]


async def test_the_same_seed_makes_the_same_world(rt: Runtime) -> None:
    async def story() -> list[float]:
        fresh = Runtime(clock=QuickClock(), random=SeededRandom(7))
        world = FakeWorld(fresh)
        times = []
        for _ in range(5):
            await booted(world, fresh)
            times.append(fresh.clock.monotonic())
        return times

    assert await story() == await story()


async def test_a_guest_gives_back_what_it_does_not_need_and_takes_it_again_when_it_does(
    world: FakeWorld, rt: Runtime
) -> None:
    engine, id, _ = await booted(world, rt)
    size = (await engine.memory(id)).size
    world.need(id, size // 2)
    await engine.balloon(id, 1)
    await engine.poll_memory(id, 1)
    sight = await engine.memory(id)
    assert (sight.granted, sight.available) == (size // 2, 0)
    world.need(id, size)
    assert (await engine.memory(id)).granted == size
    world.deafen(id)
    before = (await engine.memory(id)).at
    await rt.clock.sleep(5)
    assert (await engine.memory(id)).at == before, "what a guest that hangs said is old"
