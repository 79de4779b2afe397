"""The qemu-guest-agent speaker and the choice between the two, against scripted agents."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from corral.errors import CorralError, Refused, Unavailable
from corral.guest.connect import connect
from corral.guest.frames import MARK, Decoder, Type, encode
from corral.guest.protocol import Command, Ended, Identity, Output
from corral.guest.qga import Qga, open_qga
from corral.guest.qga_process import MAX_INPUT
from corral.guest.resident import Resident
from corral.runtime import Runtime

Answer = Callable[[str, dict[str, Any]], Any]
SILENCE = object()


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def scripted(path: Path, answer: Answer, *, leftovers: bytes = b"") -> AsyncIterator[list[str]]:
    """An agent that answers what ``answer(command, arguments)`` returns; yields the list of commands it got."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(leftovers)
        while line := await reader.readline():
            message = json.loads(line.lstrip(b"\xff"))
            seen.append(message["execute"])
            if message["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + json.dumps({"return": message["arguments"]["id"]}).encode() + b"\n")
                continue
            reply = answer(message["execute"], message.get("arguments", {}))
            if isinstance(reply, bytes):
                writer.write(reply)
            elif isinstance(reply, dict) and set(reply) == {"error"}:
                writer.write(json.dumps(reply).encode() + b"\n")
            elif reply is not SILENCE:
                writer.write(json.dumps({"return": reply}).encode() + b"\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield seen
    finally:
        server.close()


@asynccontextmanager
async def speaking(directory: Path, answer: Answer, **options: Any) -> AsyncIterator[tuple[Qga, list[str]]]:
    async with scripted(directory / "qga", answer, **options) as seen:
        guest = await open_qga(directory / "qga", Runtime(), timeout=3)
        try:
            yield guest, seen
        finally:
            await guest.close()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def a_program(status: dict[str, Any], asked: list[dict[str, Any]], polls: int = 2) -> Answer:
    """Ends with ``status`` at the ``polls``-th question."""
    left = [polls]

    def answer(command: str, arguments: dict[str, Any]) -> Any:
        if command == "guest-exec":
            asked.append(arguments)
            return {"pid": 7}
        left[0] -= 1
        return {"exited": True, **status} if left[0] <= 0 else {"exited": False}

    return answer


async def test_leftovers_of_an_earlier_connection_are_thrown_away(directory: Path) -> None:
    leftovers = b'{"return": {"half": \xff{"return": 5}\n{"return": {}}\n'
    async with speaking(directory, lambda c, a: {}, leftovers=leftovers) as (guest, _):
        await guest.ping()


async def test_after_a_time_out_it_gets_into_step_again(directory: Path) -> None:
    late = iter([SILENCE, {}])
    async with speaking(directory, lambda c, a: next(late)) as (guest, seen):
        with pytest.raises(Unavailable) as caught:
            await guest.ping(0.1)
        assert caught.value.code == "unresponsive"
        await guest.ping()
    assert seen == ["guest-sync-delimited", "guest-ping", "guest-sync-delimited", "guest-ping"]


async def test_output_and_status_come_when_the_program_has_ended(directory: Path) -> None:
    asked: list[dict[str, Any]] = []
    status = {"exitcode": 3, "out-data": b64(b"out"), "err-data": b64(b"err")}
    async with speaking(directory, a_program(status, asked)) as (guest, _):
        process = await guest.run(Command(argv=("prog", "a b"), env={"X": "1 2"}, cwd="/srv", user="joe"))
        await process.write(b"in\0")
        await process.eof()
        items = [item async for item in process.output()]
        await process.close()
    assert items == [Output(stream=1, data=b"out"), Output(stream=2, data=b"err"), Ended(status=3)]
    assert (asked[0]["path"], asked[0]["arg"]) == (
        "runuser",
        ["-u", "joe", "--", "env", "-C", "/srv", "prog", "a b"],
    )
    assert "X=1 2" in asked[0]["env"]
    assert base64.b64decode(asked[0]["input-data"]) == b"in\0"
    assert len(asked) == 1, "a program that has ended is not killed"


async def test_a_signal_is_128_and_its_number(directory: Path) -> None:
    async with speaking(directory, a_program({"signal": 9}, [])) as (guest, _):
        process = await guest.run(Command(argv=("x",)))
        assert [item async for item in process.output()] == [Ended(status=137)]


async def test_close_kills_what_runs(directory: Path) -> None:
    asked: list[dict[str, Any]] = []
    async with speaking(directory, a_program({}, asked, polls=1000)) as (guest, _):
        process = await guest.run(Command(argv=("sleep", "1000")))
        reading = asyncio.ensure_future(anext(aiter(process.output())))
        while not asked:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await process.close()
        reading.cancel()
    assert (asked[1]["path"], asked[1]["arg"]) == ("kill", ["-9", "7"])


async def test_what_it_cannot_do_is_refused(directory: Path) -> None:
    async with speaking(directory, a_program({"exitcode": 0}, [])) as (guest, _):
        with pytest.raises(Refused) as caught:
            await guest.run(Command(argv=("sh",), tty=True))
        assert caught.value.code == "unsupported"
        process = await guest.run(Command(argv=("cat",)))
        with pytest.raises(Refused) as caught:
            await process.write(bytes(MAX_INPUT + 1))
        assert caught.value.code == "unsupported"


async def test_its_refusals_are_passed_on_without_control_characters(directory: Path) -> None:
    error = {"error": {"class": "GenericError", "desc": "No such file\x1b[31m\n"}}
    async with speaking(directory, lambda c, a: error) as (guest, _):
        process = await guest.run(Command(argv=("nope",)))
        with pytest.raises(CorralError, match="No such file") as caught:
            [item async for item in process.output()]
        assert (caught.value.code, caught.value.details["status"]) == ("guest", 127)
        assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("reply", [b"[1,2]\n", b"nonsense\n", b'"x"\n', b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"{}\n"])
async def test_nonsense_is_the_guests_fault(directory: Path, reply: bytes) -> None:
    async with speaking(directory, lambda c, a: reply) as (guest, _):
        with pytest.raises(CorralError) as caught:
            await guest.ping()
        assert caught.value.code == "guest"


@pytest.mark.parametrize("reply", [7, [], {}, {"pid": "x"}])
async def test_a_malformed_start_is_the_guests_fault(directory: Path, reply: Any) -> None:
    async with speaking(directory, lambda c, a: reply) as (guest, _):
        process = await guest.run(Command(argv=("x",)))
        with pytest.raises(CorralError, match="malformed"):
            [item async for item in process.output()]


async def test_identity_travels_in_the_environment_and_failures_come_back(directory: Path) -> None:
    asked: list[dict[str, Any]] = []
    program = a_program({"exitcode": 1, "err-data": b64(b"hostname\nmac\n")}, asked, polls=1)
    async with speaking(directory, lambda c, a: {} if c == "guest-set-time" else program(c, a)) as (guest, seen):
        with pytest.raises(CorralError, match="hostname; mac"):
            await guest.identify(Identity(time=1.5, hostname="a'; reboot", mac="m", seed=b"\0s"))
    assert "guest-set-time" in seen
    assert "reboot" not in " ".join(asked[0]["arg"])
    assert "C_HOSTNAME=a'; reboot" in asked[0]["env"]
    assert "C_SEED=" + b64(b"\0s") in asked[0]["env"]


async def test_shutdown_takes_silence_for_obedience(directory: Path) -> None:
    async with speaking(directory, lambda c, a: SILENCE) as (guest, seen):
        await guest.shutdown(timeout=0.1)
    assert seen[-1] == "guest-shutdown"


async def resident_server(path: Path, delay: float = 0.0) -> asyncio.Server:
    """A corral-guest that answers hellos and nothing else."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        while data := await reader.read(1 << 16):
            decoder.feed(data)
            for frame in decoder:
                if frame.type == Type.HELLO:
                    await asyncio.sleep(delay)
                    writer.write(MARK + encode(Type.WELCOME, 0, frame.payload[:16] + b"i" * 16 + b"\1\0"))
        writer.close()

    return await asyncio.start_unix_server(serve, path)


async def test_corral_guest_is_preferred_when_both_answer(directory: Path) -> None:
    server = await resident_server(directory / "guest", delay=0.2)
    async with scripted(directory / "qga", lambda c, a: {}):
        guest = await connect(directory / "guest", directory / "qga", Runtime(), timeout=5)
        assert isinstance(guest, Resident)
        await guest.close()
    server.close()


@pytest.mark.parametrize("prefer", ["any", "qga"])
async def test_qemu_guest_agent_is_taken_when_it_is_alone(directory: Path, prefer: Any) -> None:
    async with scripted(directory / "qga", lambda c, a: {}):
        guest = await connect(directory / "guest", directory / "qga", Runtime(), timeout=5, prefer=prefer)
        assert isinstance(guest, Qga)
        await guest.close()


async def test_nobody_there_is_unresponsive_at_once(directory: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        async with asyncio.timeout(2):
            await connect(directory / "guest", directory / "qga", Runtime(), timeout=60)
    assert caught.value.code == "unresponsive"


async def test_a_guest_that_never_opens_its_port_costs_one_hello(directory: Path) -> None:
    taken = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # as QEMU while the port is closed
        taken.append(writer)

    server = await asyncio.start_unix_server(serve, directory / "guest", limit=1)
    with pytest.raises(Unavailable):
        await connect(directory / "guest", directory / "none", Runtime(), timeout=1.5, prefer="resident")
    assert len(taken) == 1
    waiting = taken[0].get_extra_info("socket").dup()
    waiting.setblocking(False)
    assert waiting.recv(1 << 20).count(MARK) <= 1
    waiting.close()
    taken[0].close()
    server.close()


async def test_a_flood_of_frames_nobody_asked_for_ends_the_connection(directory: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await reader.readexactly(16 + 12 + 18)
        writer.write(MARK + encode(Type.WELCOME, 0, hello[28:44] + b"i" * 16 + b"\1\0"))
        await reader.read(1)  # the ping
        try:
            while True:
                writer.write(encode(Type.REPLY, 99, b"x") * 1000)
                await writer.drain()
        except ConnectionError:
            writer.close()

    server = await asyncio.start_unix_server(serve, directory / "guest")
    guest = await connect(directory / "guest", directory / "qga", Runtime(), timeout=3, prefer="resident")
    with pytest.raises(CorralError) as caught:
        await guest.ping(3)
    assert caught.value.code == "guest"
    await guest.close()
    server.close()
