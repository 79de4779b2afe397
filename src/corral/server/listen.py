"""Where the API listens: a unix socket in the state directory, mode 0600, and TCP on loopback where it is asked for."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from pathlib import Path

from corral.errors import Invalid, Problem, Refused
from corral.runtime.sockets import reachable

BACKLOG = 1024
"""Connections that wait to be accepted: 500 clients may come at once."""


def unix(path: Path) -> socket.socket:
    """A listening unix socket. Whatever was at ``path`` is replaced: who holds the lock owns the name."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            with reachable(path) as name:
                listener.bind(name)
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def parse(text: str) -> tuple[str, int]:
    """HOST and PORT of ``HOST:PORT`` (``[::1]:8470`` too). Only loopback: tokens and TLS do not exist yet.

    Raises Invalid, or Refused ``unsupported`` for any other address.
    """
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not bare
        or (":" in host and not host.startswith("["))
        or not (port.isascii() and port.isdigit() and int(port) < 65536)
    ):
        raise Invalid(
            [Problem("listen", f"{text[:80]!a} is no address", "HOST:PORT, like 127.0.0.1:8470")], code="usage"
        )
    try:
        loopback = bare == "localhost" or ip_address(bare).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise Refused(
            f"the daemon does not listen on {bare[:80]!a}: off loopback that takes TLS and tokens, which it cannot yet",
            code="unsupported", field="listen", hint="listen on 127.0.0.1 and reach it through ssh -L",
        )  # fmt: skip
    return ("127.0.0.1" if bare == "localhost" else bare), int(port)


def tcp(text: str) -> socket.socket:
    """A listening TCP socket. Raises what :func:`parse` raises, and Refused ``in-use``."""
    host, port = parse(text)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Refused(f"cannot listen on {text}: {error.strerror}", code="in-use", field="listen") from error
    return listener


def text_of(listener: socket.socket) -> str:
    """``127.0.0.1:8470``, with the port that the kernel chose for 0."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
