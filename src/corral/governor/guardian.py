"""Puts weights and threads right when the governor dies or is stopped in the middle of a turn.

While threads take turns, those who wait weigh next to nothing, which nobody must be left with. So the governor has this
small process (standard library only, ``python -I -S guardian.py``) beside it and tells it on stdin, one JSON object a
line, what to do if it is not heard of for :data:`SILENT_S` or ends: ``{"files": {path: text}, "threads": [id],
"cpus": [number]}``. An empty object: there is nothing to put right; an empty line: as before. It ends with its
governor.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from typing import Any

SILENT_S = 1.0
TELL_S = 0.4
"""How often the governor says what it would want to have done; that it does is also what shows that it lives."""
PRIORITY = 11
"""SCHED_FIFO, as the governor's."""


class Guardian:
    """The governor's end. Started with the first that it is told."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: dict[str, Any] = {}

    def tell(self, files: dict[str, str], threads: list[int], cpus: list[int]) -> bool:
        """What to do when we are gone. False: nobody would do it."""
        return self._say({"files": files, "threads": threads, "cpus": cpus})

    def relieve(self) -> None:
        """There is nothing to put right any more."""
        if self._process is not None:
            self._say({})

    def _say(self, order: dict[str, Any]) -> bool:
        if self._process is None:
            command = [sys.executable, "-I", "-S", __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # one that is stopped must not stop us
        text = b"" if order == self._said else json.dumps(order).encode()
        self._said = order
        try:
            return os.write(self._process.stdin.fileno(), text + b"\n") == len(text) + 1
        except (BrokenPipeError, BlockingIOError):
            return False

    def close(self) -> None:
        """Its input ends, and so does it."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(SILENT_S)
            except subprocess.TimeoutExpired:  # it was stopped
                self._process.kill()
                self._process.wait()


def put_right(order: dict[str, Any]) -> None:
    """A VM that has ended meanwhile has no group and no threads any more: nothing to do for it."""
    for path, text in order["files"].items():
        with suppress(OSError), open(path, "w") as file:  # noqa: PTH123 - pathlib costs 5 ms of import
            file.write(text)
    for thread in order["threads"]:
        with suppress(OSError):
            os.sched_setaffinity(thread, order["cpus"])


def main() -> None:
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    order: dict[str, Any] = {}
    pending, done = b"", True
    while True:
        if not select.select([0], [], [], SILENT_S if order and not done else None)[0]:
            put_right(order)
            done = True
            continue
        piece = os.read(0, 1 << 16)
        if not piece:
            break
        *lines, pending = (pending + piece).split(b"\n")
        if said := [line for line in lines if line]:  # only the newest counts
            order = json.loads(said[-1])
        done = done and not lines
    if order:
        put_right(order)


if __name__ == "__main__":
    main()
