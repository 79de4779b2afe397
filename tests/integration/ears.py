"""Who says what to a port of the host, and since when: for guests that never stop talking (shout.c)."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


def shout(where: Path) -> Path:
    """The program that talks, for guests."""
    program = where / "shout"
    source = Path(__file__).with_name("shout.c")
    build = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        "x86_64-linux-musl",
        "-static",
        "-Os",
        "-o",
        str(program),
    ]
    subprocess.run([*build, str(source)], check=True)
    return program


class Ears:
    """All that guests say to one port of the host, by the user whose QEMU said it: (wall time, host name, number)."""

    def __init__(self) -> None:
        self.heard: dict[int, list[tuple[float, str, int]]] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._users: dict[int, int] = {}
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def close(self) -> None:
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        own.close()
        self._socket.close()

    def _listen(self) -> None:
        while True:
            data, (_, port) = self._socket.recvfrom(200)
            at = time.time()
            if not data:
                return
            name, number = data.decode().split()
            self.heard.setdefault(self._user(port), []).append((at, name, int(number)))

    def _user(self, port: int) -> int:
        """Whose socket sends from a port of the host."""
        if port not in self._users:
            rows = [row.split() for row in Path("/proc/net/udp").read_text().splitlines()[1:]]
            self._users[port] = next(int(row[7]) for row in rows if int(row[1].partition(":")[2], 16) == port)
        return self._users[port]
