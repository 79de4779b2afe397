"""corral-guest's identity message for real: in namespaces and a root directory of its own, so that this host stays itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.errors import CorralError
from corral.guest.protocol import Command, Identity
from corral.runtime import process
from tests.integration.agent_on_host import Agent, built, run, speaking

CONTAIN = ["unshare", "--uts", "--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]


def can_contain() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "chroot", "ip"))
    return (
        tools
        and os.geteuid() == 0
        and subprocess.run([*CONTAIN, "true"], capture_output=True, check=False).returncode == 0
    )


pytestmark = pytest.mark.skipif(not can_contain(), reason="needs root with unshare, chroot and ip")


@pytest.fixture
def root() -> Iterator[Path]:
    """A root directory with just enough in it."""
    top = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    for name in ("etc", "dev", "run", "proc"):
        (top / name).mkdir()
    (top / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 template\n::1 localhost\n")
    (top / "etc/machine-id").write_text("0" * 32 + "\n")
    (top / "etc/machine-id").chmod(0o444)
    os.mknod(top / "dev/urandom", 0o600 | 0o020000, os.makedev(1, 9))
    shutil.copy(built(), top / "corral-guest")
    yield top
    shutil.rmtree(top)


@pytest.fixture
def agent(root: Path) -> Iterator[Agent]:
    ours, its = socket.socketpair()
    script = (
        "ip link add eth0 type dummy 2>/dev/null || ip tuntap add eth0 mode tap;"
        "ip addr add 192.0.2.9/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.254;"
        f'mount -t proc proc {root}/proc; exec chroot {root} /corral-guest --socket-fd "$0"'
    )
    with its:
        process = subprocess.Popen([*CONTAIN, "sh", "-c", script, str(its.fileno())], pass_fds=[its.fileno()])
    one = Agent(process, ours)
    yield one
    one.stop()


IDENTITY = Identity(
    seed=b"s" * 64,
    hostname="forked",
    machine_id="a" * 32,
    ssh_host_key=b"PRIVATE\0KEY\n",
    ssh_host_key_public=b"ssh-ed25519 AAAA host\n",
    authorized_keys=b"ssh-ed25519 AAAA me\nssh-ed25519 BBBB you\n",
    mac="52:54:00:12:34:56",
    address="198.51.100.7/25",
    gateway="198.51.100.1",
    dns=("198.51.100.3", "198.51.100.4"),
)


async def test_one_message_makes_it_somebody_else(root: Path, agent: Agent) -> None:
    async with speaking(agent) as guest:
        await guest.identify(IDENTITY)
        info = await guest.info()
        assert (info.hostname, "198.51.100.7" in info.addresses) == ("forked", True)
        assert "192.0.2.9" not in info.addresses
        await guest.identify(IDENTITY)  # once more changes nothing
    assert (root / "etc/hostname").read_text() == "forked\n"
    assert (root / "etc/hosts").read_text() == "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 forked\n"
    assert (root / "etc/machine-id").read_text() == "a" * 32 + "\n"
    assert (root / "etc/resolv.conf").read_text() == "nameserver 198.51.100.3\nnameserver 198.51.100.4\n"
    key = root / "etc/ssh/ssh_host_ed25519_key"
    assert (key.read_bytes(), key.stat().st_mode & 0o777) == (IDENTITY.ssh_host_key, 0o600)
    assert (root / "etc/ssh/ssh_host_ed25519_key.pub").read_bytes() == IDENTITY.ssh_host_key_public
    keys = root / "root/.ssh/authorized_keys"
    assert (keys.read_bytes(), keys.stat().st_mode & 0o777) == (IDENTITY.authorized_keys, 0o600)
    assert keys.parent.stat().st_mode & 0o777 == 0o700
    assert not list(root.rglob("*.corral"))


async def test_card_and_route_are_the_new_ones(root: Path, agent: Agent) -> None:
    async with speaking(agent) as guest:
        await guest.identify(IDENTITY)
        shutil.copy(shutil.which("busybox") or built(), root / "busybox")
        if shutil.which("busybox"):
            _, out, _ = await run(guest, "/busybox", "cat", "/proc/net/route")
            default = [line.split() for line in out.decode().splitlines() if line.split()[1] == "00000000"]
            assert [line[2] for line in default] == ["016433C6"]
            _, out, _ = await run(guest, "/busybox", "ip", "link", "show", "eth0")
            assert b"52:54:00:12:34:56" in out
            if Path("/proc/net/if_inet6").exists():  # its IPv6 address is made of the new MAC, and no other is left
                _, out, _ = await run(guest, "/busybox", "ip", "-6", "addr", "show", "eth0")
                found = [line.split()[1] for line in out.decode().splitlines() if "inet6" in line]
                assert found == ["fe80::5054:ff:fe12:3456/64"]


async def test_files_are_written_over_where_they_are_and_links_are_not_followed(root: Path, agent: Agent) -> None:
    (root / "etc/hostname").write_text("a-name-that-is-longer\n")
    (root / "run/stub").write_text("of another program\n")
    (root / "etc/resolv.conf").symlink_to("/run/stub")
    before = (root / "etc/hostname").stat().st_ino, (root / "etc/machine-id").stat().st_ino
    async with speaking(agent) as guest:
        await guest.identify(IDENTITY)
    assert ((root / "etc/hostname").stat().st_ino, (root / "etc/machine-id").stat().st_ino) == before
    assert (root / "etc/hostname").read_text() == "forked\n"
    assert (root / "etc/machine-id").stat().st_mode & 0o777 == 0o444
    assert not (root / "etc/resolv.conf").is_symlink()
    assert (root / "run/stub").read_text() == "of another program\n"


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        (Identity(hostname="evil\nname"), "hostname"),
        (Identity(mac="52:54:00:12:34"), "mac"),
        (Identity(mac="52:54:00:12:34:56:78"), "mac"),
        (Identity(address="198.51.100.7"), "address"),
        (Identity(address="198.51.100.7/33"), "address"),
        (Identity(address="2001:db8::1/64"), "address"),
        (Identity(gateway="not-an-address"), "gateway"),
        (Identity(seed=b"x" * 257), "seed"),
        (Identity(machine_id="b" * 200), "machine-id"),
    ],
)
async def test_what_fails_is_named_and_the_rest_is_done(
    root: Path, agent: Agent, identity: Identity, named: str
) -> None:
    async with speaking(agent) as guest:
        with pytest.raises(CorralError, match=named) as caught:
            await guest.identify(
                Identity(**{**{f: getattr(identity, f) for f in identity.__struct_fields__}, "dns": ("192.0.2.1",)})
            )
        assert caught.value.code == "guest"
        with pytest.raises(CorralError, match="not found"):
            await guest.run(Command(argv=("there-is-nothing-here",)))
    assert (root / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"


async def test_a_program_goes_before_what_wakes_with_the_guest_and_a_second_later_is_like_any(agent: Agent) -> None:
    name = os.urandom(8).hex()
    waits = Command(argv=("/corral-guest", "--pretend", "--port", f"/{name}"))
    usual = (os.SCHED_OTHER, 0)
    first = (os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, -15)  # whatever it starts is like any

    def precedence() -> tuple[int, int]:
        (pid,) = process.with_arguments(b"--port", f"/{name}".encode())
        return os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)

    async with speaking(agent) as guest:
        before = await guest.run(waits)
        assert precedence() == usual
        await before.close()
        await guest.identify(IDENTITY)
        after = await guest.run(waits)
        assert precedence() == first
        async with asyncio.timeout(10):
            while precedence() != usual:
                await asyncio.sleep(0.1)
        await after.close()


async def test_a_directory_that_is_missing_is_said(root: Path, agent: Agent) -> None:
    shutil.rmtree(root / "etc")
    async with speaking(agent) as guest:
        with pytest.raises(CorralError, match="/etc/machine-id: No such file or directory"):
            await guest.identify(Identity(machine_id="c" * 32, hostname="still"))
        assert (await guest.info()).hostname == "still"
