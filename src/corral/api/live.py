"""What the API needs of a living host beyond records: programs in guests, serial lines, uploads, a fresh probe.

The agent implements it; the composition root hands it over. So the API imports no agent, and a simulated or remote
host can stand in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from corral.guest.protocol import Command, GuestInfo, Process
from corral.model.usage import Usage


class SerialSession(Protocol):
    """One person at a VM's serial console. Output that is not read in time is dropped, never queued without bound."""

    def output(self) -> AsyncIterator[bytes]:
        """What the guest prints: first the ring's tail, then live. Ends when the VM's serial line closes."""
        ...

    async def write(self, data: bytes) -> None: ...


class Live(Protocol):
    """A host's agent, as the API sees it. Errors: NotFound, Refused ``wrong-phase``, Unavailable."""

    async def run(self, vm_id: str, command: Command) -> Process:
        """Start a program in the guest."""
        ...

    async def guest_info(self, vm_id: str) -> GuestInfo: ...

    async def resize_console(self, vm_id: str, rows: int, columns: int) -> None:
        """Tell the guest the size of the terminal at its serial console, where its agent can."""
        ...

    def console(self, vm_id: str) -> AbstractAsyncContextManager[SerialSession]: ...

    async def serial_log(self, vm_id: str, tail: int) -> bytes:
        """The last ``tail`` bytes of the serial log (bounded by the ring)."""
        ...

    def follow_log(self, vm_id: str) -> AsyncIterator[bytes]:
        """Tail, then whatever comes."""
        ...

    async def receive(self, image_id: str, chunks: AsyncIterator[bytes], length: int | None) -> None:
        """Take the content of an image that waits for its upload; returns when the bytes are durable."""
        ...

    async def probe(self) -> None:
        """Probe the accelerators again and write the host's record."""
        ...

    async def usage(self, *, lately: bool = False) -> Usage:
        """Who uses what on this host, now; ``lately``: CPU time of VMs averaged over the last seconds."""
        ...

    async def doctor(self) -> list[dict[str, Any]]:
        """Checks of this host: ``name``, ``ok`` (true, false or "warn"), ``message``, ``hint``."""
        ...
