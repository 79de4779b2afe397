"""A program behind qemu-guest-agent: started when its whole input is known, asked about until it has ended."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

from corral.errors import CorralError, Refused
from corral.guest.protocol import Command, Ended, Output
from corral.runtime import Runtime

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_INPUT = 1 << 20
"""The agent takes input only as one piece of its start message."""
INPUT_GRACE_S = 0.3
"""A caller that writes nothing and says no end of input within this time has none to give."""
POLL_S = (0.02, 0.5)
MAX_PIECE = 65536


class Call(Protocol):
    """:meth:`corral.guest.qga.Qga.call`."""

    def __call__(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 5.0
    ) -> Awaitable[Any]: ...


def exec_arguments(command: Command, stdin: bytes) -> dict[str, Any]:
    """The arguments of guest-exec: user and directory by the programs made for it, no shell in between."""
    argv = list(command.argv)
    if command.cwd:
        argv = ["env", "-C", command.cwd, *argv]
    if command.user and command.user != "root":
        argv = ["runuser", "-u", command.user, "--", *argv]
    env = {"PATH": DEFAULT_PATH, **command.env}
    arguments: dict[str, Any] = {"path": argv[0], "arg": argv[1:], "capture-output": True}
    arguments["env"] = [f"{name}={value}" for name, value in env.items()]
    if stdin:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    return arguments


class QgaProcess:
    """Implements :class:`corral.guest.protocol.Process` as far as qemu-guest-agent lets it."""

    def __init__(self, call: Call, rt: Runtime, command: Command) -> None:
        self._call, self._rt, self._command = call, rt, command
        self._input = bytearray()
        self._complete = asyncio.Event()  # no more input will come
        self._written = False
        self._pid: int | None = None
        self._ended = False

    async def collect(self) -> tuple[bytes, int]:
        """Run it without input: all its output and its status."""
        words, status = bytearray(), 0
        await self.eof()
        async for item in self.output():
            if isinstance(item, Ended):
                status = item.status
            else:
                words += item.data
        return bytes(words), status

    async def output(self) -> AsyncIterator[Output | Ended]:
        """Starts the program; its output comes when it has ended. Raises ``guest`` when it cannot be started."""
        await self._input_known()
        pid = self._pid = await self._start()
        wait, longest = POLL_S
        while not (status := await self._ask_status(pid)).get("exited"):
            await self._rt.clock.sleep(wait)
            wait = min(longest, 1.5 * wait)
        self._ended = True
        for stream, key in ((1, "out-data"), (2, "err-data")):
            data = decoded(status, key)
            for at in range(0, len(data), MAX_PIECE):
                yield Output(stream=stream, data=data[at : at + MAX_PIECE])
            if status.get(key.replace("data", "truncated")):
                raise CorralError("qemu-guest-agent cut the program's output off", code="guest")
        yield Ended(status=_status(status))

    async def _start(self) -> int:
        try:
            started = await self._call("guest-exec", exec_arguments(self._command, bytes(self._input)), timeout=30.0)
        except CorralError as error:
            if error.code == "guest":  # as a shell would say it
                error.details["status"] = 127 if "No such file" in error.message else 126
            raise
        pid = started.get("pid") if isinstance(started, dict) else None
        if not isinstance(pid, int):
            raise CorralError("qemu-guest-agent sent a malformed answer", code="guest")
        return pid

    async def _ask_status(self, pid: int) -> dict[str, Any]:
        reply = await self._call("guest-exec-status", {"pid": pid}, timeout=30.0)
        if not isinstance(reply, dict):
            raise CorralError("qemu-guest-agent sent a malformed answer", code="guest")
        return reply

    async def _input_known(self) -> None:
        if not self._written and not self._complete.is_set():
            try:
                async with asyncio.timeout(INPUT_GRACE_S):
                    await self._complete.wait()
            except TimeoutError:
                if not self._written:
                    self._complete.set()
        await self._complete.wait()

    async def write(self, data: bytes) -> None:
        if self._complete.is_set() or len(self._input) + len(data) > MAX_INPUT:
            raise Refused(
                "qemu-guest-agent takes a program's input only at its start, at most 1 MiB",
                code="unsupported",
                hint="use an image with corral-guest",
            )
        self._written = True
        self._input += data

    async def eof(self) -> None:
        self._complete.set()

    async def signal(self, number: int) -> None:
        if self._pid is not None and not self._ended:
            arguments = {"path": "kill", "arg": [f"-{number}", str(self._pid)], "env": [f"PATH={DEFAULT_PATH}"]}
            await self._call("guest-exec", arguments)

    async def resize(self, rows: int, columns: int) -> None:
        raise Refused("this guest has no terminal to give", code="unsupported")

    async def close(self) -> None:
        await self.signal(9)
        self._ended = True


def decoded(reply: Any, key: str) -> bytes:
    """A base64 member of an answer, empty when absent; raises ``guest`` when it is something else."""
    try:
        return base64.b64decode(reply.get(key, ""), validate=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise CorralError("qemu-guest-agent sent a malformed answer", code="guest") from error


def _status(reply: dict[str, Any]) -> int:
    """What a shell would say: the exit code, or 128 + the signal."""
    number, base = (reply["signal"], 128) if "signal" in reply else (reply.get("exitcode"), 0)
    if not isinstance(number, int):
        raise CorralError("qemu-guest-agent sent a malformed answer", code="guest")
    return (base + number) & 0xFF
