"""Many forks of one VM at once, of one that never stops talking: each is somebody before anything of it is heard.

``CORRAL_TEST_FORKS=50`` for more than ten.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.platform import FORKS, Platform, wait_until
from tests.integration.test_templates import who

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]


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


@pytest.fixture
def ears() -> Iterator[Ears]:
    one = Ears()
    yield one
    one.close()


@pytest.fixture(scope="module")
def shout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that talks, for guests."""
    program = tmp_path_factory.mktemp("shout") / "shout"
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


@pytest.mark.skipif(os.geteuid() != 0, reason="without root all VMs are one user, and who said what cannot be told")
def test_each_is_somebody_before_anything_of_it_is_heard(platform: Platform, ears: Ears, shout: Path) -> None:
    platform.run("launch", "micro", "--name", "talker", "--memory", "96M")
    platform.run("cp", str(shout), "talker:/shout")
    talk = f"chmod +x /shout; setsid /shout {ears.port} >/dev/null 2>&1 </dev/null &"
    platform.run("exec", "talker", "--", "sh", "-c", talk)
    parent = platform.vm("talker")["status"]["pid"]
    user = os.stat(f"/proc/{parent}").st_uid
    wait_until(lambda: user in ears.heard, 20, "the parent to be heard")
    before = who(platform, "talker")

    said = platform.text("vm", "fork", "talker", "--name", "child", "--count", str(FORKS), "--timeout", "400s", timeout=420)  # fmt: skip
    assert re.search(r"talker stood still for \d+ ms", said)
    names = [f"child-{number + 1}" for number in range(FORKS)]
    children = {name: platform.vm(name) for name in names}
    users = {name: os.stat(f"/proc/{vm['status']['pid']}").st_uid for name, vm in children.items()}
    wait_until(lambda: set(users.values()) <= set(ears.heard), 60, "each fork to be heard")
    for name, vm in children.items():
        heard = ears.heard[users[name]]
        somebody = vm["meta"]["created"] + vm["status"]["details"]["start"]["timings"]["identity"]
        assert heard[0][0] > somebody, f"{name} was heard {somebody - heard[0][0]:.3f} s before it was somebody"
        assert heard[-1][1] == name

    with ThreadPoolExecutor(2) as pool:
        people = [before, *pool.map(lambda name: who(platform, name), names)]
    for what in range(5):  # all but the address, which is the same behind each one's own NAT
        assert len({person[what] for person in people}) == FORKS + 1, [person[what] for person in people]
    assert platform.vm("talker")["status"]["pid"] == parent
    assert who(platform, "talker")[:4] == before[:4]
    numbers = [number for _, _, number in ears.heard[user]]
    assert numbers == sorted(set(numbers)), "the parent said everything once, in order"
    assert {name for _, name, _ in ears.heard[user]} == {"talker"}
    last = numbers[-1]
    wait_until(lambda: ears.heard[user][-1][2] > last, 20, "the parent to go on")
    platform.run("delete", "talker", *names, "--force", timeout=300)
    platform.assert_nothing_left()
