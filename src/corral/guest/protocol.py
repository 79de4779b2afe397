"""The one interface to whoever answers inside a guest.

Implementations: :mod:`corral.guest.resident` (corral-guest, our own agent) and :mod:`corral.guest.qga`. Every call has
a deadline. Errors: Unavailable ``unresponsive`` (no answer), CorralError ``guest`` (the guest refused, with its words),
Refused ``unsupported`` (this speaker cannot).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Command(Struct, frozen=True, kw_only=True):
    """A program to run in the guest."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = ""
    user: str = ""
    """Empty: root."""
    tty: bool = False
    rows: int = 24
    columns: int = 80
    processes: int | None = None
    """Processes and threads that it may have at once, itself and all its descendants together; None: no limit."""


class GuestInfo(Struct, frozen=True, kw_only=True):
    """What the guest says about itself; untrusted text, bounded."""

    agent: str
    version: str = ""
    hostname: str = ""
    os: str = ""
    kernel: str = ""
    addresses: tuple[str, ...] = ()
    boot_id: str = ""
    ready: bool = True
    """The image's own start-up (user data included) is done."""


class Identity(Struct, frozen=True, kw_only=True):
    """Who a guest is to be. Only what is not None is set. ``seed``: entropy for its random generator."""

    time: float | None = None
    seed: bytes | None = None
    hostname: str | None = None
    machine_id: str | None = None
    ssh_host_key: bytes | None = None
    """ed25519 private key, OpenSSH format."""
    ssh_host_key_public: bytes | None = None
    authorized_keys: bytes | None = None
    mac: str | None = None
    address: str | None = None
    """CIDR, like 10.0.2.15/24."""
    gateway: str | None = None
    dns: tuple[str, ...] = ()


class Output(Struct, frozen=True, kw_only=True):
    """A piece of a program's output. ``stream`` is 1 or 2 (a terminal has only 1)."""

    stream: int
    data: bytes


class Ended(Struct, frozen=True, kw_only=True):
    """A program's end: its exit status, 128+n for a signal, as a shell would say it.

    ``crowded``: it wanted more processes than it may have.
    """

    status: int
    crowded: bool = False


class Process(Protocol):
    """A running program in the guest. Always :meth:`close` it: a program that still runs is then killed (SIGKILL)."""

    def output(self) -> AsyncIterator[Output | Ended]:
        """Pieces in order; the last item is :class:`Ended`. Back-pressure: unread output stops the program."""
        ...

    async def write(self, data: bytes) -> None:
        """To its stdin; waits while the guest does not read."""
        ...

    async def eof(self) -> None:
        """Close its stdin."""
        ...

    async def signal(self, number: int) -> None: ...

    async def resize(self, rows: int, columns: int) -> None: ...

    async def close(self) -> None: ...


class Guest(Protocol):
    """A connection to one guest's agent."""

    async def ping(self, timeout: float = 2.0) -> None:
        """Raises Unavailable ``unresponsive`` when it does not answer."""
        ...

    async def info(self, timeout: float = 5.0) -> GuestInfo: ...

    async def run(self, command: Command) -> Process:
        """Start a program. Raises CorralError ``guest`` when it cannot be started, with the guest's reason."""
        ...

    async def identify(self, identity: Identity, timeout: float = 5.0) -> None:
        """Set what is given, in one message; raises ``guest`` naming what failed."""
        ...

    async def shutdown(self, *, reboot: bool = False, timeout: float = 5.0) -> None:
        """Ask the guest to power off (or reboot) in good order."""
        ...

    async def close(self) -> None: ...
