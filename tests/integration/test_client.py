"""Both clients against a daemon on a pretended host: the same words, the same errors, over a real socket."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import corral
from corral import sync
from corral.errors import CorralError, Invalid, NotFound, Refused, TimedOut, Unavailable
from corral.model import Vm
from tests.integration.platform import wait_until

pytestmark = pytest.mark.timeout(120)


class Daemon:
    """A daemon of its own, restartable."""

    def __init__(self, *arguments: str, parent: Path | None = None) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="corral-client-", dir=parent or "/tmp"))
        self.state.chmod(0o711)
        self.arguments = arguments
        self.start()

    def start(self) -> None:
        with (self.state / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "corral.server", "--state", str(self.state), *self.arguments],
                env={**os.environ, "CORRAL_ENGINE": "fake", "CORRAL_TEMPLATES": "off"}, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self._serves, 40, "the daemon to serve")

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log()
        return (self.state / "api.sock").exists()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def log(self) -> str:
        return (self.state / "daemon.log").read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.state)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    one = Daemon()
    with sync.connect(state=one.state) as client:
        client.tasks.wait(client.images.build("debian").tasks[0].id, timeout=30)
    yield one
    one.close()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[sync.Client]:
    with sync.connect(state=daemon.state) as one:
        yield one
        for vm in one.vms.list():
            one.vms.delete(vm.id, force=True)


def test_a_vm_from_launch_to_delete(client: sync.Client) -> None:
    steps: list[str] = []
    vm = client.vms.launch(
        "debian", name="web", memory="128M", labels={"a": "b"}, on_change=lambda task: steps.append(task.phase)
    )
    assert (vm.name, vm.phase, vm.labels, vm.project) == ("web", "running", {"a": "b"}, "default")
    assert steps[-1] == "done"
    typed = vm.typed()
    assert isinstance(typed, Vm)
    assert typed.meta.id == vm.id
    assert [one.name for one in client.vms.list(labels={"a": "b"}, phase="running")] == ["web"]
    assert client.vms.list(labels={"a": "c"}) == []
    for verb, phase in (("pause", "paused"), ("resume", "running"), ("stop", "stopped"), ("start", "running")):
        assert client.vms.power(verb, "web").phase == "done"
        assert client.vms.wait("web", phase, timeout=10).name == "web"
    with pytest.raises(Refused) as caught:
        client.vms.delete("web")
    assert caught.value.code == "wrong-phase"
    assert "--force" in caught.value.hint
    assert client.vms.delete("default/web", force=True).phase == "done"
    with pytest.raises(NotFound):
        client.vms.get("web")


def test_programs_in_a_guest(client: sync.Client) -> None:
    with sync.sandbox("debian", client=client, memory="128M") as vm:
        assert vm.run("echo", "hello") == (0, b"hello\n", b"", "")
        assert vm.run("sh", "-c", "exit 7").status == 7
        data = os.urandom(3 << 20)
        assert vm.run("cat", input=data).stdout == data
        with pytest.raises(CorralError) as caught:
            vm.run("no-such-program")
        assert caught.value.code == "guest"
        with pytest.raises(TimedOut):
            with client.vms.exec(vm.id, ("cat",)) as program:
                program.read(timeout=0.2)
        with client.vms.exec(vm.id, ("cat",), tty=True) as program:
            program.resize(40, 100)
            program.signal(signal.SIGINT)
            assert list(program) == []
            assert program.status == 128 + signal.SIGINT
        with pytest.raises(Invalid):
            client.vms.run(vm.id, "")
        name = vm.name
    wait_until(lambda: name not in [one.name for one in client.vms.list()], 10, "the sandbox to be gone")
    with pytest.raises(NotFound):
        client.vms.run("no-such-vm", "true")


def test_consoles_and_logs(client: sync.Client) -> None:
    with sync.sandbox("debian", client=client, memory="128M") as vm:
        assert b"pretended" in client.vms.log(vm.name)
        assert client.vms.log(vm.name, tail=4) == b"st\r\n"
        assert b"pretended" in b"".join(client.vms.follow_log(vm.name))
        with client.vms.console(vm.name) as line:
            assert b"pretended" in line.read(5)
            line.write(b"typed")
            assert line.read(5) == b"typed"
        with pytest.raises(NotFound), client.vms.console("no-such-vm") as line:
            line.read(5)


def test_uploads_and_the_catalogue(client: sync.Client, tmp_path: Path) -> None:
    file = tmp_path / "disk.raw"
    file.write_bytes(b"\0" * (3 << 20))
    begun = client.images.begin({"source": "upload", "format": "raw"}, name="mine")
    sent: list[int] = []
    client.images.upload("mine", file, on_bytes=sent.append)
    assert sent[-1] == 3 << 20
    assert client.tasks.wait(begun.tasks[0].id, timeout=20).phase == "done"
    with pytest.raises(Refused) as caught:
        client.images.upload("mine", iter([b"x"]))
    assert caught.value.code == "wrong-phase"
    client.images.delete("mine")
    assert "micro" in [entry["name"] for entry in client.images.catalogue()]


def test_what_everybody_can_read(client: sync.Client, daemon: Daemon) -> None:
    assert client.version()["pid"] == daemon.process.pid
    assert {"qemu", "accelerator"} <= {check["name"] for check in client.doctor()}
    kinds = {"vm", "image", "template", "flavor", "volume", "network", "project", "host", "task", "event"}
    assert set(client.schema()) == kinds
    (host,) = client.hosts.list()
    assert client.hosts.probe(host.name).phase == "ready"
    flavor = client.flavors.create({"memory": 256 << 20}, name="mine")
    assert client.flavors.patch("mine", spec={"cpus": 2}, revision=flavor.revision).spec["cpus"] == 2
    with pytest.raises(Refused) as caught:
        client.flavors.patch("mine", spec={"cpus": 3}, revision=flavor.revision)
    assert caught.value.code == "stale"
    client.flavors.delete("mine")


def test_pages_follow_each_other(client: sync.Client) -> None:
    client.vms.begin({"image": "debian", "power": "stopped", "memory": {"size": 64 << 20}}, name="p", count=25)
    names, cursor = [], None
    while True:
        page = client.vms.page(limit=10, cursor=cursor)
        names += [vm.name for vm in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert names == sorted(f"p-{n}" for n in range(1, 26))
    with pytest.raises(Invalid):
        client.flavors.page(cursor=client.vms.page(limit=1).cursor)


async def test_the_asynchronous_twin_says_the_same(daemon: Daemon) -> None:
    async with corral.connect(state=daemon.state) as client:
        async with corral.sandbox("debian", client=client, memory="128M") as vm:
            result = await vm.run("echo", "hello")
            assert (result.status, result.text) == (0, "hello\n")
            data = os.urandom(1 << 20)
            assert (await vm.run("cat", input=data)).stdout == data
            async with client.vms.exec(vm.id, ("cat",)) as program:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(program.read(), 0.2)
            async with client.vms.console(vm.id) as line:
                assert b"pretended" in await line.read()
            assert b"pretended" in await client.vms.log(vm.id)
            assert [one.id for one in await client.vms.list(name=vm.name)] == [vm.id]
            assert (await client.vms.stop(vm.id)).phase == "done"
            assert (await client.vms.wait(vm.id, "stopped", timeout=5)).phase == "stopped"
            with pytest.raises(TimedOut):
                await client.vms.wait(vm.id, "running", timeout=0.2)
        with pytest.raises(NotFound):
            await client.vms.get("no-such-vm")
        with pytest.raises(Invalid) as caught:
            await client.vms.begin({"image": "debian", "cpu": {"count": 0}})
        assert caught.value.problems[0].field == "spec.cpu.count"
        assert (await client.version())["pid"] == daemon.process.pid


def test_a_wait_survives_the_daemon() -> None:
    one = Daemon()
    try:
        with sync.connect(state=one.state) as client:
            begun = client.images.begin({"source": "upload", "format": "raw"}, name="up", timeout_s=60)
            seen = []
            for task in client.follow("task", begun.tasks[0], timeout=60):
                seen.append(task.phase)
                if len(seen) == 1:
                    one.stop(signal.SIGKILL)
                    one.start()
                    client.tasks.cancel(task.id)
                if task.phase == "cancelled":
                    break
            assert seen[-1] == "cancelled"
    finally:
        one.close()


def test_without_a_daemon_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_AUTOSTART", "0")
    with sync.connect(state=tmp_path) as client, pytest.raises(Unavailable) as caught:
        client.vms.list()
    assert "corral up" in caught.value.hint


def test_sigterm_ends_it_at_once_and_leaves_nothing() -> None:
    deep = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp")) / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    one = Daemon("--listen", "127.0.0.1:0", parent=deep)
    try:
        assert (one.state / "api.sock").stat().st_mode & 0o777 == 0o600
        with sync.connect(state=one.state) as client:
            (address,) = client.version()["listen"]
            watch = client.watch("vm")
            next(watch)
            second = subprocess.run(
                [sys.executable, "-m", "corral.server", "--state", str(one.state)], capture_output=True, text=True
            )
            assert second.returncode == 4
            assert str(one.process.pid) in second.stderr
            with sync.connect(f"http://{address}") as other:
                assert other.version()["pid"] == one.process.pid
            started = time.monotonic()
            assert one.stop() == 0
            assert time.monotonic() - started < 8
        assert not (one.state / "api.sock").exists()
        assert "Traceback" not in one.log()
    finally:
        one.close()
        shutil.rmtree(deep.parents[1])


@pytest.mark.parametrize(("address", "status"), [("0.0.0.0:1", 4), ("example.org:1", 4), ("127.0.0.1", 2), ("::1", 2)])
def test_it_listens_on_loopback_only(tmp_path: Path, address: str, status: int) -> None:
    command = [sys.executable, "-m", "corral.server", "--state", str(tmp_path), "--listen", address]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CORRAL_ENGINE": "fake", "CORRAL_TEMPLATES": "off"}
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")


def test_other_names_and_other_sites_are_turned_away(daemon: Daemon) -> None:
    """DNS rebinding: a page of another site reaches the loopback port, under its own name."""
    one = Daemon("--listen", "127.0.0.1:0")
    try:
        with sync.connect(state=one.state) as client:
            host, port = client.version()["listen"][0].split(":")
        for headers in ("Host: evil.example", f"Host: {host}:{port}\r\nOrigin: https://evil.example"):
            with socket.create_connection((host, int(port)), timeout=10) as line:
                line.sendall(f"GET /v1/version HTTP/1.1\r\n{headers}\r\n\r\n".encode())
                answer = line.recv(4096)
            assert answer.startswith(b"HTTP/1.1 403")
            assert b"application/problem+json" in answer
            assert b"nosniff" in answer
    finally:
        one.close()
