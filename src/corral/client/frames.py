"""The frames of an exec socket, as both clients and the daemon write them (binary messages).

Client to daemon: ``0`` stdin data · ``1`` end of stdin · ``2`` signal (one byte) · ``3`` terminal size (rows, columns,
two bytes each). Daemon to client: ``1`` stdout · ``2`` stderr · ``3`` exit status (one byte; a second one, 1, if it
wanted more processes than it may have) · ``4`` error (a problem body) · ``5`` stdin taken (count of bytes, four bytes).
The first message of the client is the command, as JSON text.

A client has at most :data:`WINDOW` bytes of stdin on the way that were not yet taken. So the daemon always reads: a
signal never waits behind input that the program does not read, and two full sockets cannot block each other.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from corral.errors import Bug, CorralError, from_problem

STDOUT, STDERR, EXIT, ERROR, TAKEN = 1, 2, 3, 4, 5
CHUNK = 64 << 10
"""Bytes of one message at most: small enough to keep a terminal quick while a file goes through."""
WINDOW = 512 << 10
"""Bytes of stdin on the way at most: a round trip of them at the speed that an emulated guest reaches."""


class Output(NamedTuple):
    """A piece of output: ``stream`` 1 or 2."""

    stream: int
    data: bytes


class Ended(NamedTuple):
    """The program's end. ``crowded``: it wanted more processes than it may have."""

    status: int
    crowded: bool = False


class Taken(NamedTuple):
    """So many bytes of stdin have reached the guest."""

    size: int


def command(
    argv: tuple[str, ...], *, env: dict[str, str] | None = None, cwd: str = "", user: str = "", tty: bool = False,
    rows: int = 24, columns: int = 80, processes: int | None = None,
) -> str:  # fmt: skip
    """The first message."""
    body: dict[str, Any] = {"argv": list(argv), "env": env or {}, "cwd": cwd, "user": user, "tty": tty}
    return json.dumps(body | {"rows": rows, "columns": columns, "processes": processes})


def stdin(data: bytes) -> bytes:
    return b"\x00" + data


def eof() -> bytes:
    return b"\x01"


def signal(number: int) -> bytes:
    return bytes((2, number))


def resize(rows: int, columns: int) -> bytes:
    return b"\x03" + min(rows, 0xFFFF).to_bytes(2) + min(columns, 0xFFFF).to_bytes(2)


def console_size(rows: int, columns: int) -> str:
    """The text message of a console socket that tells the terminal's size."""
    return json.dumps({"rows": rows, "columns": columns})


def parse(message: str | bytes) -> Output | Ended | Taken:
    """What the daemon said. Raises the error of an error frame."""
    if isinstance(message, str) or not message:
        raise Bug("the daemon sent a message that is no frame")
    kind = message[0]
    if kind in (STDOUT, STDERR):
        return Output(kind, message[1:])
    if kind == EXIT:
        return Ended(message[1], message[2:3] == b"\x01")
    if kind == TAKEN:
        return Taken(int.from_bytes(message[1:5]))
    if kind == ERROR:
        raise problem(message[1:])
    raise Bug(f"the daemon sent a frame of unknown kind {kind}")


def problem(body: bytes | str) -> CorralError:
    """The error that a problem body describes; a body that is none becomes an error that quotes it."""
    try:
        read = json.loads(body)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        text = body.decode(errors="replace") if isinstance(body, bytes) else body
        return Bug(f"the daemon's answer is no problem body: {text[:200]!a}")
    error = from_problem(read)
    details = read.get("details")
    if isinstance(details, dict):
        error.details.update(details)
    return error
