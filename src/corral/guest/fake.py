"""A guest that exists only as data, for the simulator and for tests: it answers while its machine is up.

:class:`FakeConnector` is called like :func:`corral.guest.connect.connect`. What it needs to know of the machines is the
small protocol :class:`Inside`; :class:`corral.engine.fake.FakeWorld` has that shape.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, Protocol

from corral.errors import CorralError, Unavailable
from corral.guest.protocol import Command, Ended, GuestInfo, Identity, Output
from corral.runtime import Runtime

_LOOK = 0.1
"""Seconds between looks at whether a guest answers."""


class Inside(Protocol):
    """What a fake guest sees of its world."""

    def guest_at(self, channel: Path) -> Any:
        """The machine behind a channel (``machine.id``, ``boots``, ``alive``, ``told``), None when there is none."""
        ...

    def answers(self, id: str) -> bool: ...

    def press(self, machine: Any) -> None:
        """The power button, which a guest obeys in its own time."""
        ...

    def reboot(self, id: str) -> None: ...


class FakeProcess:
    """A program in a fake guest: its output is known when it starts, except for ``cat``, which repeats its input.

    ``lasting``: it does not end with its input.
    """

    def __init__(self, output: bytes, status: int, *, repeats: bool = False, lasting: bool = False) -> None:
        self._pieces: asyncio.Queue[Output | Ended] = asyncio.Queue()
        self._repeats, self._lasting = repeats, lasting
        if output:
            self._pieces.put_nowait(Output(stream=1, data=output))
        if not repeats:
            self._pieces.put_nowait(Ended(status=status))

    async def output(self) -> AsyncIterator[Output | Ended]:
        while True:
            piece = await self._pieces.get()
            yield piece
            if isinstance(piece, Ended):
                return

    async def write(self, data: bytes) -> None:
        if self._repeats and data:
            self._pieces.put_nowait(Output(stream=1, data=data))

    async def eof(self) -> None:
        if not self._lasting:
            self._end(0)

    async def signal(self, number: int) -> None:
        self._end(128 + number)

    async def resize(self, rows: int, columns: int) -> None:
        """A fake program draws nothing: its terminal may have any size."""

    async def close(self) -> None:
        self._end(137)

    def _end(self, status: int) -> None:
        if self._repeats:
            self._repeats = False
            self._pieces.put_nowait(Ended(status=status))


class FakeGuest:
    """One connection. It ends with the boot that it was made in, as a real agent's does."""

    def __init__(self, inside: Inside, channel: Path, rt: Runtime) -> None:
        self._inside, self._rt, self._channel = inside, rt, channel
        self._machine = inside.guest_at(channel)
        self._boots = self._machine.boots
        self.identity: Identity | None = None
        """What it was told to be, last."""

    @property
    def _id(self) -> str:
        return str(self._machine.machine.id)

    def _up(self) -> bool:
        same = self._inside.guest_at(self._channel) is self._machine and self._machine.boots == self._boots
        return same and self._inside.answers(self._id)

    async def _answer(self, timeout: float) -> None:
        if not self._up():
            await self._rt.clock.sleep(timeout)
            if not self._up():
                raise Unavailable("the guest's agent does not answer", code="unresponsive")

    async def ping(self, timeout: float = 2.0) -> None:
        await self._answer(timeout)

    async def info(self, timeout: float = 5.0) -> GuestInfo:
        await self._answer(timeout)
        name = str(self._machine.machine.name)
        return GuestInfo(
            agent="corral-guest", version="fake", hostname=name, os="Fake", boot_id=f"{self._id}-{self._boots}"
        )

    async def run(self, command: Command) -> FakeProcess:
        """``true``, ``false``, ``echo …``, ``cat``, ``sleep infinity``, ``sh -c "exit N"``, scripts of several lines.

        All else is not found.
        """
        await self._answer(5.0)
        match list(command.argv):
            case ["true"]:
                return FakeProcess(b"", 0)
            case ["false"]:
                return FakeProcess(b"", 1)
            case ["echo", *words]:
                return FakeProcess(" ".join(words).encode() + b"\n", 0)
            case ["cat"]:
                return FakeProcess(b"", 0, repeats=True)
            case ["sleep", "infinity"]:
                return FakeProcess(b"", 0, repeats=True, lasting=True)
            case [("sh" | "/bin/sh"), "-c", script]:
                return _shell(script)
            case ["/etc/passwd"]:
                raise CorralError("/etc/passwd: Permission denied", code="guest", status=126)
        raise CorralError(f"{command.argv[:1]}: No such file or directory", code="guest", status=127)

    async def identify(self, identity: Identity, timeout: float = 5.0) -> None:
        await self._answer(timeout)
        self.identity = self._machine.told = identity

    async def shutdown(self, *, reboot: bool = False, timeout: float = 5.0) -> None:
        await self._answer(timeout)
        if reboot:
            self._inside.reboot(self._id)
        else:
            self._inside.press(self._machine)

    async def close(self) -> None:
        """Nothing is held open."""


def _shell(script: str) -> FakeProcess:
    if "\n" in script.strip():
        return FakeProcess(b"", 0)  # what only real guests can do has been done
    words = shlex.split(script)
    match words:
        case ["exit", status] if status.isdigit():
            return FakeProcess(b"", int(status) & 255)
        case ["echo", *rest]:
            return FakeProcess(" ".join(rest).encode() + b"\n", 0)
        case ["true"]:
            return FakeProcess(b"", 0)
    return FakeProcess(b"", 127)


class FakeConnector:
    """Called like :func:`corral.guest.connect.connect`: waits until the guest answers, at most ``timeout`` seconds."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside

    async def __call__(
        self,
        channels_guest: Path,
        channels_qga: Path,
        rt: Runtime,
        *,
        prefer: Literal["any", "resident", "qga"] = "any",
        timeout: float = 300.0,
    ) -> FakeGuest:
        end = rt.clock.monotonic() + timeout
        while rt.clock.monotonic() < end:
            machine = self._inside.guest_at(channels_guest)
            if machine is None or not machine.alive:
                break  # nobody listens on the socket any more
            if self._inside.answers(str(machine.machine.id)):
                return FakeGuest(self._inside, channels_guest, rt)
            await rt.clock.sleep(_LOOK)
        raise Unavailable("the guest's agent does not answer", code="unresponsive")
