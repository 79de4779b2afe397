"""Exec and console over websockets, bridged to a living host, with back-pressure both ways.

The frames are those of :mod:`corral.client.frames` (described there and in the REST reference): every socket is
accepted, and what goes wrong is told in its last message. Little is queued here: a slow reader stops the guest's
program; of stdin a client may have WINDOW bytes on the way, so that signals never wait behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import structlog
from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketDisconnect, WebSocketException
from litestar.handlers import WebsocketRouteHandler

from corral.api.kinds import Project, Ref
from corral.api.live import Live, SerialSession
from corral.api.problems import body_of
from corral.api.service import Service
from corral.errors import Bug, CorralError, Invalid, Problem, Refused
from corral.guest.protocol import Command, Ended, Process
from corral.model import Vm, strict
from corral.model.base import Struct
from corral.model.validate import accept
from corral.runtime import deadline

log = structlog.get_logger("api")
FIRST_S = 10.0
"""The command is the first thing a client sends: longer than this is nobody."""
MAX_SESSIONS = 512
"""Open sockets; each holds a process or a console."""
CHUNK = 64 << 10
MAX_ARGUMENTS = 4096
MAX_PROCESSES = 4_194_304
"""The most that Linux can have."""
MAX_COMMAND = 256 << 10
"""Bytes of argv and env together; Linux takes 2 MiB, a corral-guest frame less."""

WINDOW = 512 << 10
"""Bytes of stdin that a client may send ahead of what the guest has taken."""

Socket = WebSocket[Any, Any, Any]


class Run(Struct, frozen=True, kw_only=True):
    """The first message of an exec socket."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = ""
    user: str = ""
    tty: bool = False
    rows: int = 24
    columns: int = 80
    processes: int | None = None
    """Processes and threads at once, at most."""


class Size(Struct, frozen=True, kw_only=True):
    """A terminal's size."""

    rows: int
    columns: int


def routes(service: Service, live: Live) -> list[WebsocketRouteHandler]:
    """Both."""
    sessions = _Sessions()

    @websocket("/v1/vms/{ref:str}/exec")
    async def exec_(socket: Socket, ref: Ref, project: Project = "default") -> None:
        async def serve() -> None:
            command = await _command(socket)
            vm = await service.objects.find(Vm, ref, project)
            process = await live.run(vm.meta.id, command)
            try:
                inbox = _Inbox()
                await _bridge(
                    _process_out(socket, process), _process_in(socket, process, inbox), _feed(socket, process, inbox)
                )
            finally:
                await process.close()

        await sessions.hold(socket, serve, binary=True)

    @websocket("/v1/vms/{ref:str}/console")
    async def console(socket: Socket, ref: Ref, project: Project = "default") -> None:
        async def serve() -> None:
            vm = await service.objects.find(Vm, ref, project)
            async with live.console(vm.meta.id) as session:
                await _bridge(_console_out(socket, session), _console_in(socket, session, live, vm.meta.id))

        await sessions.hold(socket, serve, binary=False)

    return [exec_, console]


class _Sessions:
    """Counts open sockets, and ends each with what there is to say."""

    def __init__(self) -> None:
        self._open = 0

    async def hold(self, socket: Socket, serve: Callable[[], Awaitable[None]], *, binary: bool) -> None:
        self._open += 1
        try:
            await socket.accept()
            if self._open > MAX_SESSIONS:
                raise Refused("too many consoles and programs are open", code="busy", hint="close some")
            await serve()
            await socket.close(1000)
        except (WebSocketDisconnect, WebSocketException, OSError):
            return  # the client has gone (the server says so as an OSError); whatever it had open is closed by now
        except CorralError as error:
            await _say(socket, error, binary=binary)
        except Exception as error:
            log.exception("socket failed", path=socket.url.path, exc_info=error)
            await _say(socket, Bug(f"an error in Corral itself ({type(error).__name__})"), binary=binary)
        finally:
            self._open -= 1


async def _say(socket: Socket, error: CorralError, *, binary: bool) -> None:
    """The error as the last message."""
    with suppress(WebSocketDisconnect, WebSocketException, OSError, RuntimeError):  # gone: nobody is left to be told
        if binary:
            await socket.send_bytes(b"\x04" + body_of(error))
        else:
            await socket.send_text(body_of(error).decode())
        await socket.close(1011)


async def _bridge(out: Awaitable[None], *into: Awaitable[None]) -> None:
    """Run all directions until the outward one ends, or any fails; an error is raised as it is."""
    tasks = [asyncio.ensure_future(part) for part in (out, *into)]
    try:
        pending = set(tasks)
        while not tasks[0].done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                for task in done:
                    task.result()
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _receive(socket: Socket) -> str | bytes:
    """The next message. Raises WebSocketDisconnect when there are no more."""
    event: Any = await socket.receive()
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(detail="the client has gone", code=event.get("code", 1006))
    data = event.get("bytes")
    return data if data is not None else str(event.get("text") or "")


async def _command(socket: Socket) -> Command:
    async with deadline(FIRST_S, "the command of an exec socket"):
        message = await _receive(socket)
    raw = message.encode() if isinstance(message, str) else message
    run = accept(Run, strict.loads(raw), "", _run_problems)
    return Command(
        argv=run.argv, env=run.env, cwd=run.cwd, user=run.user, tty=run.tty, rows=run.rows, columns=run.columns,
        processes=run.processes,
    )  # fmt: skip


def _run_problems(run: Run) -> Iterator[Problem]:
    if not run.argv or not run.argv[0]:
        yield Problem("argv", "there is no program", "at least one word")
    if len(run.argv) > MAX_ARGUMENTS:
        yield Problem("argv", f"has {len(run.argv)} words", f"at most {MAX_ARGUMENTS}")
    words = [*run.argv, *run.env, *run.env.values()]
    if sum(len(word.encode()) for word in words) > MAX_COMMAND:
        yield Problem("argv", "is too long with its environment", f"at most {MAX_COMMAND} bytes")
    if any("\0" in word for word in [*words, run.cwd, run.user]):
        yield Problem("argv", "holds a NUL character", "text")
    if any(not key or "=" in key for key in run.env):
        yield Problem("env", "holds a name that is empty or contains =", "names like PATH")
    if len(run.cwd) > 4096 or len(run.user) > 256:
        yield Problem("cwd", "or user is too long", "a path, a user's name")
    if run.processes is not None and not 1 <= run.processes <= MAX_PROCESSES:
        yield Problem("processes", f"{run.processes} is out of range", f"1 to {MAX_PROCESSES}, or null for no limit")
    yield from _size_problems(run)


def _size_problems(size: Run | Size) -> Iterator[Problem]:
    if not (1 <= size.rows <= 0xFFFF and 1 <= size.columns <= 0xFFFF):
        yield Problem("rows", f"{size.rows} by {size.columns} is no terminal", "1 to 65535")


async def _process_out(socket: Socket, process: Process) -> None:
    async for piece in process.output():
        if isinstance(piece, Ended):
            await socket.send_bytes(bytes((3, piece.status & 0xFF, *([1] if piece.crowded else []))))
            return
        for at in range(0, len(piece.data), CHUNK):
            await socket.send_bytes(bytes((piece.stream,)) + piece.data[at : at + CHUNK])
    raise Bug("a program's output ended without its status")


class _Inbox:
    """Stdin on its way to the guest, in pieces; an empty one is its end. Never more than the window."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._ahead, self._ended = 0, False

    def put(self, data: bytes) -> None:
        """Take what a client sent. Raises Invalid when it sends more than it may."""
        if self._ended or self._ahead + len(data) > WINDOW:
            text = "stdin after its end, or more than was taken"
            raise Invalid([Problem("frame", text, f"at most {WINDOW} bytes ahead")], code="malformed")
        self._ahead += len(data)
        self._ended = not data
        self._pieces.put_nowait(data)

    async def get(self) -> bytes:
        return await self._pieces.get()

    def taken(self, count: int) -> None:
        self._ahead -= count


async def _process_in(socket: Socket, process: Process, inbox: _Inbox) -> None:
    """What the client sends: stdin goes to ``inbox``, orders to the program at once."""
    while True:
        message = await _receive(socket)
        if isinstance(message, str) or not message:
            raise Invalid([Problem("frame", "is no binary frame", "see the REST reference")], code="malformed")
        kind, rest = message[0], message[1:]
        if kind == 0:
            if rest:
                inbox.put(rest)
        elif kind == 1 and not rest:
            inbox.put(b"")
        elif kind == 2 and len(rest) == 1 and 1 <= rest[0] <= 64:
            await process.signal(rest[0])
        elif kind == 3 and len(rest) == 4:
            await process.resize(int.from_bytes(rest[:2]), int.from_bytes(rest[2:]))
        else:
            raise Invalid([Problem("frame", f"kind {kind} with {len(rest)} bytes is unknown")], code="malformed")


async def _feed(socket: Socket, process: Process, inbox: _Inbox) -> None:
    """Stdin to the program, and word to the client how much of it was taken."""
    while data := await inbox.get():
        await process.write(data)
        inbox.taken(len(data))
        await socket.send_bytes(b"\x05" + len(data).to_bytes(4))
    await process.eof()


async def _console_out(socket: Socket, session: SerialSession) -> None:
    async for data in session.output():
        if data:
            await socket.send_bytes(bytes(data))


async def _console_in(socket: Socket, session: SerialSession, live: Live, vm_id: str) -> None:
    while True:
        message = await _receive(socket)
        if isinstance(message, bytes):
            await session.write(message)
        else:
            size = accept(Size, strict.loads(message.encode()), "", _size_problems)
            await live.resize_console(vm_id, size.rows, size.columns)
