"""Keeps the memory of templates alive: a program of its own, run as ``python -I -S holder.py SOCKET PATH LOCK``.

A sealed memfd lives as long as somebody has it open. Forks do, and the daemon does, but templates must outlive both.
This process has nothing else to do, and nothing in it can fail: it knows no file but its socket. It ends when the last
template is dropped, or when its socket's file is gone (somebody deleted the state directory).

One packet is one request, answered by one: ``put ID`` (with a descriptor), ``get ID`` (the answer has one),
``drop ID``, ``list``. Answers begin with ``ok`` or ``no``. :mod:`corral.engine.qemu.fork.keeper` asks.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

LIMIT = 1024
"""Templates of one host."""
CLIENT_S, IDLE_S = 2.0, 30.0
PACKET = 1 << 17
"""An answer to ``list`` with as many ids as there can be."""


def answer(kept: dict[str, int], request: str, fds: list[int]) -> tuple[str, list[int]]:
    """What is said to one request. Takes over ``fds``."""
    verb, _, id = request.partition(" ")
    if verb == "put" and len(fds) == 1 and (id in kept or len(kept) < LIMIT):
        if id in kept:
            os.close(kept[id])
        kept[id] = fds.pop()
        return "ok", []
    if verb == "get" and id in kept:
        return "ok", [kept[id]]
    if verb == "drop":
        if id in kept:
            os.close(kept.pop(id))
        return "ok", []
    if verb == "list":
        return " ".join(["ok", *kept]), []
    return "no", []


def serve(connection: socket.socket, kept: dict[str, int]) -> None:
    """One request of one client, who is not waited for."""
    connection.settimeout(CLIENT_S)
    data, fds, _, _ = socket.recv_fds(connection, 256, 4)
    try:
        words, given = answer(kept, data.decode("ascii", "replace"), fds)
    finally:
        for fd in fds:
            os.close(fd)
    socket.send_fds(connection, [words.encode()], given)


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    path = sys.argv[2]
    listener.settimeout(IDLE_S)
    for number in (signal.SIGINT, signal.SIGHUP):  # of the terminal that the daemon was started from
        signal.signal(number, signal.SIG_IGN)
    try:
        with open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123 - no more imports than needed
            score.write("-900")  # its end costs every template; what it holds is not freed by it alone
    except OSError:
        pass  # only root may ask for that
    kept: dict[str, int] = {}
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if not kept or not os.path.exists(path):  # noqa: PTH110
                break
            continue
        with connection:
            try:
                serve(connection, kept)
                dropped = not kept
            except OSError:  # the client went away
                continue
        if dropped:
            break
    # The lock is held until the end, so nobody starts another holder before this socket is gone.
    if os.path.exists(path):  # noqa: PTH110
        os.unlink(path)  # noqa: PTH108


if __name__ == "__main__":
    main()
