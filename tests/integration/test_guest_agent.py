"""corral-guest, the real binary, running on this machine behind a socket: what it promises to the host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from corral.errors import CorralError, Refused, Unavailable
from corral.guest.frames import MARK, WINDOW, Type, encode
from corral.guest.protocol import Command, Ended, Identity, Output
from corral.guest.resident import Resident
from tests.integration.agent_on_host import Agent, built, guest_at_path, run, speaking, start_agent

MIB = 1 << 20


@pytest.fixture
def agent() -> Iterator[Agent]:
    one = start_agent(built())
    try:
        yield one
    finally:
        assert one.stop() == 0


@pytest.fixture
async def guest(agent: Agent) -> AsyncIterator[Resident]:
    async with speaking(agent) as one:
        yield one


async def gone(pid: int) -> bool:
    """Whether the process ends (a zombie has) within two seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_it_answers_on_a_socket_in_a_deep_directory() -> None:
    top = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    try:
        deep = top / ("d" * 60) / ("e" * 60)
        deep.mkdir(parents=True)
        async with guest_at_path(deep / "guest.sock", built()) as (guest, _):
            await guest.ping()
    finally:
        shutil.rmtree(top)


async def test_it_tells_about_the_guest(guest: Resident) -> None:
    info = await guest.info()
    assert info.agent == "corral-guest"
    assert info.hostname == os.uname().nodename
    assert info.kernel == os.uname().release
    assert info.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_a_program_has_its_own_streams_and_status(guest: Resident) -> None:
    assert await run(guest, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")


async def test_a_signal_is_128_and_its_number(guest: Resident) -> None:
    assert (await run(guest, "sh", "-c", "kill -TERM $$"))[0] == 143


async def test_a_signal_reaches_the_program(guest: Resident) -> None:
    process = await guest.run(
        Command(argv=("sh", "-c", "trap 'echo usr1; exit 3' USR1; echo up; while :; do sleep 0.05; done"))
    )
    items = []
    async for item in process.output():
        items.append(item)
        if item == Output(stream=1, data=b"up\n"):
            await process.signal(10)
    assert Output(stream=1, data=b"usr1\n") in items  # (its child gets the signal too, and says so)
    assert items[-1] == Ended(status=3)


@pytest.mark.parametrize(
    ("argv", "options", "reason", "status"),
    [
        (("no-such-program",), {}, "no-such-program: not found", 127),
        (("/etc/passwd",), {}, "/etc/passwd: Permission denied", 126),
        (("true",), {"cwd": "/no/such"}, "/no/such: No such file", 126),
        (("true",), {"user": "nobody-at-all"}, "no such user", 126),
    ],
)
async def test_what_cannot_be_started_says_why(
    guest: Resident, argv: tuple[str, ...], options: dict[str, str], reason: str, status: int
) -> None:
    with pytest.raises(CorralError, match=reason) as caught:
        await guest.run(Command(argv=argv, **options))  # type: ignore[arg-type]
    assert caught.value.code == "guest"
    assert caught.value.details["status"] == status
    assert (await run(guest, "true"))[0] == 0


async def test_environment_and_directory(guest: Resident) -> None:
    status, out, _ = await run(
        guest, "sh", "-c", 'printf "%s|" "$PWD" "$A" "$B" "$HOME"', cwd="/usr", env={"A": "1 '2'\n3", "B": ""}
    )
    assert (status, out.split(b"|")[:3]) == (0, [b"/usr", b"1 '2'\n3", b""])


async def test_the_agents_own_environment_stays_with_it(guest: Resident) -> None:
    names = {line.partition(b"=")[0] for line in (await run(guest, "/usr/bin/env"))[1].splitlines()}
    assert names <= {b"PATH", b"HOME", b"USER", b"LOGNAME", b"SHELL", b"PWD"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("user", ["nobody", "65534"])
async def test_another_user_is_that_user_in_everything(guest: Resident, user: str) -> None:
    _, out, _ = await run(guest, "sh", "-c", "id -u; id -G; echo $USER; cat /etc/shadow 2>/dev/null", user=user)
    assert out == b"65534\n65534\nnobody\n"


async def test_64_mib_pass_through_unchanged(guest: Resident) -> None:
    data = os.urandom(MIB) * 63 + MARK * (MIB // len(MARK))
    status, out, _ = await run(guest, "cat", stdin=data)
    assert status == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


async def test_twenty_programs_at_once_beside_a_big_stream(guest: Resident) -> None:
    big = os.urandom(MIB) * 16

    async def small(number: int) -> tuple[int, bytes, bytes]:
        return await run(guest, "sh", "-c", f"cat; exit {number}", stdin=b"%d" % number * 100_000)

    results = await asyncio.gather(run(guest, "cat", stdin=big), *(small(n) for n in range(20)))
    assert results[0] == (0, big, b"")
    assert results[1:] == [(n, b"%d" % n * 100_000, b"") for n in range(20)]


async def test_a_program_that_does_not_read_delays_nobody(guest: Resident) -> None:
    stuck = await guest.run(Command(argv=("sleep", "1000")))
    writing = asyncio.create_task(stuck.write(bytes(MIB)))
    await asyncio.sleep(0.2)
    assert not writing.done()
    await guest.ping(1.0)
    assert (await run(guest, "echo", "x"))[1] == b"x\n"
    await stuck.close()
    await asyncio.wait_for(writing, 5)


async def test_writing_to_a_program_that_closed_its_input_goes_nowhere(guest: Resident) -> None:
    assert await run(guest, "sh", "-c", "exec <&-; sleep 0.1; echo done", stdin=bytes(4 * MIB)) == (0, b"done\n", b"")


async def test_a_slow_reader_stops_the_program_and_costs_no_memory(agent: Agent, guest: Resident) -> None:
    process = await guest.run(Command(argv=("sh", "-c", "head -c 64M /dev/zero; echo end >&2")))
    await asyncio.sleep(0.5)
    before = agent.memory()
    total, items = 0, process.output()
    async for item in items:
        if isinstance(item, Ended):
            break
        if total == 0:
            waiting = sum(len(piece.data) for piece in process._pieces)  # type: ignore[attr-defined]
            assert waiting <= WINDOW
            await guest.ping(1.0)
        total += len(item.data) if item.stream == 1 else 0
    assert total == 64 * MIB
    assert agent.memory() < 8 * MIB
    assert agent.memory() - before < MIB


async def test_output_in_tiny_pieces_is_bounded_too(guest: Resident) -> None:
    script = "i=0; while [ $i -lt 6000 ]; do echo $i; echo $i >&2; i=$((i+1)); done"
    process = await guest.run(Command(argv=("sh", "-c", script)))
    await asyncio.sleep(1.0)
    assert len(process._pieces) * 65 <= WINDOW  # type: ignore[attr-defined]
    seen = {1: bytearray(), 2: bytearray()}
    async for item in process.output():
        if isinstance(item, Output):
            seen[item.stream] += item.data
    assert seen[1] == seen[2] == b"".join(b"%d\n" % i for i in range(6000))


async def test_end_of_input_ends_a_reader(guest: Resident) -> None:
    assert await run(guest, "cat") == (0, b"", b"")


async def test_a_terminal_has_a_size_that_changes(guest: Resident) -> None:
    script = "trap 'stty size; exit 0' WINCH; tty; stty size; while :; do sleep 0.05; done"
    process = await guest.run(Command(argv=("sh", "-c", script), tty=True, rows=33, columns=99))
    seen, asked = b"", False
    async for item in process.output():
        if isinstance(item, Output):
            seen += item.data
        if b"33 99" in seen and not asked:
            asked = True
            await process.resize(50, 120)
    lines = seen.split(b"\r\n")
    assert lines[0].startswith(b"/dev/pts/")
    assert lines[1:3] == [b"33 99", b"50 120"]


async def test_a_terminal_ends_and_interrupts_as_one_does(guest: Resident) -> None:
    assert (await run(guest, "sh", "-c", "stty -echo; cat; echo end", stdin=b"x\n", tty=True))[1].endswith(b"end\r\n")
    process = await guest.run(Command(argv=("sh", "-c", "echo up; sleep 1000"), tty=True))
    status = None
    async for item in process.output():
        if isinstance(item, Ended):
            status = item.status
        else:
            await process.write(b"\x03")
    assert status == 130


async def test_a_background_program_does_not_hold_the_end_back(guest: Resident) -> None:
    async with asyncio.timeout(5):
        status, out, _ = await run(guest, "sh", "-c", "sleep 30 & echo $!")
    assert status == 0
    os.kill(int(out), 9)


async def test_close_kills_the_whole_group(guest: Resident) -> None:
    process = await guest.run(Command(argv=("sh", "-c", "trap '' TERM HUP; sleep 1000 & echo $$ $!; wait")))
    first = await anext(aiter(process.output()))
    assert isinstance(first, Output)
    await process.close()
    assert [await gone(int(pid)) for pid in first.data.split()] == [True, True]


async def test_a_new_hello_kills_what_the_old_connection_ran(agent: Agent) -> None:
    async with speaking(agent) as old:
        process = await old.run(Command(argv=("sh", "-c", "echo $$; exec sleep 1000")))
        first = await anext(aiter(process.output()))
        assert isinstance(first, Output)
        old._writer.transport.pause_reading()  # as if its daemon had died: it reads no more and says no goodbye
        async with speaking(agent) as new:
            assert await gone(int(first.data))
            assert (await run(new, "echo", "new"))[1] == b"new\n"


async def test_a_hello_that_is_repeated_kills_nothing(guest: Resident) -> None:
    process = await guest.run(Command(argv=("cat",)))
    guest._hello()
    guest._hello(padded=False)
    await guest.ping()
    await process.write(b"still here")
    await process.eof()
    assert [item async for item in process.output()] == [Output(stream=1, data=b"still here"), Ended(status=0)]


@pytest.mark.parametrize(
    "leftovers",
    [
        os.urandom(5000),
        bytes(200_000),
        MARK[:9],
        encode(Type.STDIN, 5, bytes(60_000))[:-1],  # a frame that an earlier connection left half sent
        encode(Type.STDIN, 5, bytes(60_000))[:14],
        MARK + encode(Type.HELLO, 0, b"short"),
    ],
)
async def test_it_comes_back_into_step_after_leftovers(agent: Agent, leftovers: bytes) -> None:
    agent.ours.sendall(leftovers)
    async with speaking(agent) as guest:
        assert (await run(guest, "echo", "in step"))[1] == b"in step\n"


async def test_garbage_in_a_session_ends_the_session_but_not_the_agent(agent: Agent) -> None:
    async with speaking(agent) as guest:
        process = await guest.run(Command(argv=("sleep", "1000")))
        agent.ours.sendall(b"this is no frame at all")
        with pytest.raises(CorralError, match="not a frame") as caught:
            [item async for item in process.output()]
        assert caught.value.code == "guest"
    async with speaking(agent) as guest:
        await guest.ping()


async def test_input_beyond_the_credit_ends_the_session(agent: Agent) -> None:
    async with speaking(agent) as guest:
        process = await guest.run(Command(argv=("sleep", "1000")))
        process._credit -= 8 * 32768  # type: ignore[attr-defined]
        for _ in range(8):  # more than its pipe and its window
            guest.send(Type.STDIN, 1, bytes(32768))
        with pytest.raises(CorralError, match="more input than credit"):
            await guest.ping()


async def test_too_many_programs_are_refused_and_recover(guest: Resident) -> None:
    running = [await guest.run(Command(argv=("sleep", "1000"))) for _ in range(64)]
    with pytest.raises(Unavailable) as caught:
        await guest.run(Command(argv=("true",)))
    assert caught.value.code == "busy"
    await asyncio.gather(*(process.close() for process in running))
    assert (await run(guest, "true"))[0] == 0


async def test_a_thousand_programs_leave_nothing_behind(agent: Agent, guest: Resident) -> None:
    for _ in range(50):
        assert all(status == 0 for status, _, _ in await asyncio.gather(*(run(guest, "true") for _ in range(20))))
    assert len(os.listdir(f"/proc/{agent.process.pid}/fd")) < 8
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    assert children == []


@pytest.mark.parametrize(
    "command",
    [
        Command(argv=()),
        Command(argv=("a\0b",)),
        Command(argv=("a",), env={"A=B": "c"}),
        Command(argv=("a", "b" * 70_000)),
    ],
)
async def test_commands_that_cannot_be_are_refused_here(guest: Resident, command: Command) -> None:
    with pytest.raises(Refused):
        await guest.run(command)
    await guest.ping()


async def test_it_only_pretends_here(guest: Resident) -> None:
    with pytest.raises(CorralError, match="pretending"):
        await guest.identify(Identity(hostname="other"))
    with pytest.raises(CorralError, match="pretending"):
        await guest.shutdown()


async def test_a_silent_guest_is_unresponsive_and_said_so(agent: Agent, guest: Resident) -> None:
    os.kill(agent.process.pid, 19)
    try:
        with pytest.raises(Unavailable) as caught:
            await guest.ping(0.2)
        assert caught.value.code == "unresponsive"
    finally:
        os.kill(agent.process.pid, 18)
    await guest.ping()


async def test_an_agent_that_dies_is_heard_by_everybody_who_waits() -> None:
    agent = start_agent(built())
    async with speaking(agent) as guest:
        process = await guest.run(Command(argv=("sleep", "3")))
        agent.process.kill()
        agent.ours.shutdown(2)
        with pytest.raises(Unavailable) as caught:
            [item async for item in process.output()]
        assert caught.value.code == "unresponsive"
        with pytest.raises(Unavailable):
            await guest.ping()
    agent.stop()


async def test_it_ends_in_order_and_takes_its_programs_along() -> None:
    agent = start_agent(built())
    async with speaking(agent) as guest:
        process = await guest.run(Command(argv=("sh", "-c", "echo $$; exec sleep 1000")))
        first = await anext(aiter(process.output()))
        assert isinstance(first, Output)
        agent.process.terminate()
        assert agent.process.wait(10) == 0
        assert await gone(int(first.data))
    agent.ours.close()
