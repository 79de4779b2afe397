"""Where the daemon is: a unix socket in a state directory, or a URL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from corral.errors import Invalid, Problem

MAX_SOCKET_PATH = 107
"""Bytes of a unix socket's path that the kernel takes."""
SOCKET = "api.sock"


class Address(NamedTuple):
    """``socket`` for the daemon of this machine; else ``host`` and ``port``, with TLS if ``secure``."""

    socket: Path | None = None
    host: str = "localhost"
    port: int = 0
    secure: bool = False

    @property
    def text(self) -> str:
        """For people: ``unix:/var/lib/corral/api.sock`` or ``http://127.0.0.1:8470``."""
        return f"unix:{self.socket}" if self.socket else f"{'https' if self.secure else 'http'}://{self.authority}"

    @property
    def authority(self) -> str:
        """What goes into the ``Host`` header."""
        if self.socket:
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connectable(self) -> tuple[str, int | None]:
        """A name for the socket that the kernel takes, and the directory descriptor to close after connecting."""
        assert self.socket is not None
        path = os.fsencode(self.socket)
        if len(path) <= MAX_SOCKET_PATH:
            return str(self.socket), None
        directory = os.open(self.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{directory}/{self.socket.name}", directory


def state_directory() -> Path:
    """``CORRAL_STATE``; else ``/var/lib/corral`` for root and ``$XDG_DATA_HOME/corral`` for others. Always absolute."""
    given = os.environ.get("CORRAL_STATE")
    if given:
        return Path(os.path.abspath(given))  # noqa: PTH100 - keeps links as the user wrote them
    if os.geteuid() == 0:
        return Path("/var/lib/corral")
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if data.startswith("/") else Path.home() / ".local" / "share") / "corral"


def resolve(url: str | None = None, state: str | os.PathLike[str] | None = None) -> Address:
    """The address that the arguments mean, then ``CORRAL_URL``, then this machine's daemon.

    ``url``: ``http://…``, ``https://…`` or ``unix:/path/api.sock``. Raises :class:`Invalid` for anything else.
    """
    if state is not None and url is None:
        return Address(Path(os.path.abspath(state)) / SOCKET)  # noqa: PTH100 - see above
    text = url or os.environ.get("CORRAL_URL", "")
    if not text:
        return Address(state_directory() / SOCKET)
    parts = urlsplit(text)
    if parts.scheme == "unix" and parts.path.startswith("/"):
        return Address(Path(parts.path))
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.path.strip("/"):
        raise Invalid(
            [Problem("url", f"{ascii(text)[:80]} is no address of a daemon", "http://HOST:PORT or unix:/PATH")]
        )
    secure = parts.scheme == "https"
    return Address(None, parts.hostname, port or (443 if secure else 80), secure)
