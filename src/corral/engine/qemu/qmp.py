"""All of QMP, and all of the library qemu.qmp: one connection to one QEMU, a deadline on every call.

Three traps of the library and the protocol are closed here: an event listener waits for ever after QEMU is gone (it
is raced with the connection's end), ``disconnect()`` raises what ended the connection (EOFError and others), and QEMU
serves one client per socket (a second one hangs; so there is one :class:`Link` per machine, in one process). QMP is
access to the host's files: the verbs in :class:`Verb` are all that Corral ever says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener

from corral.errors import CorralError, Unavailable
from corral.runtime import deadline
from corral.runtime.sockets import reachable

# It logs every lost connection as an error; each of them is reported by us, as an exception or an event.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Verb(StrEnum):
    """Every QMP command that is used."""

    STATUS = "query-status"
    CPUS = "query-cpus-fast"
    DISKS = "query-block"
    CHANNELS = "query-chardev"
    BLOCK_STATS = "query-blockstats"
    BALLOON_STATE = "query-balloon"
    BALLOON = "balloon"
    GET = "qom-get"
    SET = "qom-set"
    CONTINUE = "cont"
    STOP = "stop"
    RESET = "system_reset"
    POWERDOWN = "system_powerdown"
    SET_LINK = "set_link"
    SAVE_DEVICES = "xen-save-devices-state"
    """In every QEMU, whatever its name says: the state of all devices, without memory."""
    NODES = "query-named-block-nodes"
    ADD_NODE = "blockdev-add"
    REMOVE_NODE = "blockdev-del"
    TRANSACTION = "transaction"
    MONITOR = "human-monitor-command"
    """For ``hostfwd_add`` alone, which QMP has no word for (:mod:`corral.engine.qemu.take`)."""


EVENTS = ("STOP", "RESUME", "RESET", "SHUTDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR")
"""Every QMP event that is listened to."""


class Link:
    """A connection to a machine's QMP socket. Made by :meth:`open`; useless once :attr:`up` is false.

    Args:
        on_event: called with an event's name and data, in order.
    """

    def __init__(self, name: str, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._name, self._on_event = name, on_event
        self._client = QMPClient(name)
        self._listener = EventListener(EVENTS)
        self._client.register_listener(self._listener)  # before connecting, so that no event is missed
        self._pump: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, name: str, path: Path, on_event: Callable[[str, dict[str, Any]], None], timeout: float) -> Link:
        """Connect and greet. Raises Unavailable ``unresponsive``."""
        link = cls(name, on_event)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)  # connecting to a unix socket is immediate or EAGAIN
            with reachable(path) as address:
                connection.connect(address)
            async with deadline(timeout, f"the greeting of {name}"):
                await link._client.connect(connection)
        except (QMPError, OSError, EOFError, CorralError) as error:
            connection.close()
            raise Unavailable(f"QEMU does not answer: {_words(error)}", code="unresponsive") from error
        except BaseException:
            connection.close()
            raise
        link._pump = asyncio.create_task(link._deliver(), name=f"qmp-events-{name}")
        return link

    @property
    def up(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    async def call(self, verb: Verb, arguments: dict[str, object] | None = None, *, timeout: float) -> Any:
        """Say ``verb``. Raises CorralError ``engine`` with QEMU's words, or Unavailable ``unresponsive``."""
        try:
            async with deadline(timeout, f"QEMU's answer to {verb.value}"):
                return await self._client.execute(verb.value, arguments)
        except ExecuteError as error:
            raise CorralError(f"QEMU refused {verb.value}: {error}", code="engine") from error
        except (QMPError, OSError, EOFError, Unavailable) as error:
            raise Unavailable(f"QEMU does not answer: {_words(error)}", code="unresponsive") from error

    async def close(self) -> None:
        """Hang up. Never raises."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        # What ended the connection comes out here, whatever it was; those who needed to know have been told.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._client.disconnect()

    async def _deliver(self) -> None:
        ended = asyncio.ensure_future(self._ended())
        event: asyncio.Future[Message] | None = None
        try:
            while not ended.done() or not self._listener.empty():
                event = asyncio.ensure_future(self._listener.get())
                await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    continue
                message: Message = event.result()
                data = message.get("data")
                self._on_event(str(message["event"]), cast(dict[str, Any], data) if isinstance(data, dict) else {})
        finally:
            ended.cancel()
            if event is not None:
                event.cancel()

    async def _ended(self) -> None:
        while self.up:
            await self._client.runstate_changed()


def _words(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:300]
