"""The daemon's side of :mod:`corral.engine.qemu.fork.holder`: starts it when it is needed, and asks.

There is one holder per directory of templates: it inherits a file lock, and without the lock none is started. Calls
block, for a millisecond as a rule and a few seconds at most.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

from corral.engine.qemu.fork.holder import PACKET
from corral.errors import Unavailable
from corral.runtime.sockets import reachable

_PROGRAM = Path(__file__).with_name("holder.py")
_ANSWER_S = 20.0
"""A millisecond, but on a host that has no time or waits for its disks."""
_TRIES, _PAUSE_MS = 200, 10
"""Between the end of one holder and the start of the next: at most two seconds."""


class Keeper:
    """The memories that are kept for the templates in ``directory``, by id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket, self._lock = directory / "holder.sock", directory / "holder.lock"

    def put(self, id: str, fd: int) -> None:
        """Keep ``fd`` (the holder gets a copy). Raises Unavailable."""
        nap = select.poll()
        for _ in range(_TRIES):
            answer, _fd = self._ask(f"put {id}", fd)
            if answer == "ok":
                return
            if answer is None:
                self._start()
            nap.poll(_PAUSE_MS)
        raise Unavailable(f"the holder of templates cannot be reached: {self._socket}")

    def get(self, id: str) -> int | None:
        """A descriptor of what is kept under ``id``, if it is."""
        return self._ask(f"get {id}")[1]

    def drop(self, id: str) -> None:
        """Have ``id`` kept no more."""
        self._ask(f"drop {id}")

    def ids(self) -> set[str]:
        """What is kept."""
        answer, _ = self._ask("list")
        return set(answer.split()[1:]) if answer else set()

    def _ask(self, request: str, fd: int | None = None) -> tuple[str | None, int | None]:
        """The holder's answer and the descriptor in it; None, None when there is no holder."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER_S)
            try:
                with reachable(self._socket) as address:
                    connection.connect(address)
                socket.send_fds(connection, [request.encode()], [] if fd is None else [fd])
                data, fds, _, _ = socket.recv_fds(connection, PACKET, 1)
            except TimeoutError as error:
                raise Unavailable("the holder of templates does not answer", code="unresponsive") from error
            except OSError:
                return None, None  # nobody listens, or it ended just now
        if fds:
            os.set_inheritable(fds[0], False)
        return data.decode() or None, fds[0] if fds else None

    def _start(self) -> None:
        """Start a holder unless there is one."""
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # one is there: it starts or ends just now
            self._socket.unlink(missing_ok=True)
            listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with reachable(self._socket) as address:
                listener.bind(address)
            self._socket.chmod(0o600)
            listener.listen(16)
            # Detached: the one between ends at once, so that no daemon has to wait for the holder's end.
            shell = '"$@" &'
            subprocess.run(
                ["/bin/sh", "-c", shell, "sh", sys.executable, "-I", "-S", str(_PROGRAM), str(listener.fileno()),
                 str(self._socket)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd=self._directory, env={"LC_ALL": "C"}, pass_fds=[listener.fileno(), lock],
                start_new_session=True, check=True, timeout=_ANSWER_S,
            )  # fmt: skip
