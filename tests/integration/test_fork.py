"""Real guests frozen and forked: memory and disk are of one instant, the parent notices nothing, templates are safe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from corral.engine.protocol import Card, HostForward
from corral.engine.qemu.fork import ram
from corral.engine.qemu.fork.keeper import Keeper
from corral.guest.protocol import Guest
from corral.runtime import process
from tests.contract.test_engine import REAL, free_port
from tests.integration.fork_lab import CACHE, CARD, Lab, anonymous, lab_of, sh
from tests.integration.platform import Platform, alive, wait_until

pytestmark = pytest.mark.skipif(not REAL, reason="QEMU is not here")

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
COUNT = """
i=0
printf '%-512s' $i | dd of=/dev/vda bs=512 oflag=direct
while :; do
    set -- $(dd if=/dev/vda bs=512 count=1 iflag=direct)
    [ $1 = $i ] || echo $1 on disk, $i in memory >>/run/wrong
    i=$((i+1))
    printf '%-512s' $i | dd of=/dev/vda bs=512 oflag=direct
    echo $i >/run/count
done
"""
SEND = "while :; do echo hello | nc 10.0.2.2 {port} & sleep 0.2; done"


@pytest.fixture(scope="module", autouse=True)
def micro() -> None:
    """The image, built once."""
    if not any('"name":"micro"' in path.read_text() for path in CACHE.glob("images/*/manifest.json")):
        with Platform() as platform:
            platform.up()
            platform.run("image", "build", "micro", timeout=300)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with lab_of("micro", 160 * MIB) as one:
        yield one


BROKEN_OFF = """
import asyncio, os
from corral.engine.qemu.fork import ram
from tests.integration.fork_lab import lab_of, run_to_its_end

async def main():
    async with lab_of("micro", 160 << 20) as lab:
        lab.engine._ground.shelf.keeper.put("template", ram.make(4096))
        print(lab.root, flush=True)
        await asyncio.sleep(100)

run_to_its_end(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bench_that_is_broken_off_leaves_no_holder_and_no_directory(number: int) -> None:
    bench = subprocess.Popen([sys.executable, "-c", BROKEN_OFF], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    place = Path(bench.stdout.readline().strip())
    holders = [pid for pid in process.pids() if process.working_directory(pid) == str(place / "templates")]
    assert len(holders) == 1
    bench.send_signal(number)
    bench.communicate(timeout=60)
    assert bench.returncode == 128 + number
    assert not place.exists()
    wait_until(lambda: not alive(holders[0]), 10, "the holder to end")


def checksum(lab: Lab, template: str) -> str:
    """Of a template's memory as it is now."""
    fd = Keeper(lab.root / "templates").get(template)
    assert fd is not None
    try:
        return ram.digest(fd)
    finally:
        os.close(fd)


async def start(guest: object, script: str) -> None:
    """Have the script run in the guest and stay when nobody is connected any more."""
    await sh(guest, f"cat >/run/job <<'EOF'\n{script}\nEOF\nsetsid sh /run/job >/dev/null 2>&1 </dev/null &")  # type: ignore[arg-type]


async def count(guest: Guest) -> int:
    """How far :data:`COUNT` is. Its file is empty for a moment each time it is written."""
    return int(await sh(guest, "until read n </run/count && [ $n ]; do :; done; echo $n"))


async def test_memory_and_disk_of_a_fork_are_of_one_instant(lab: Lab) -> None:
    machine = lab.machine(data=MIB)
    guest = await lab.booted(machine)
    await start(guest, COUNT)
    pid = (await lab.engine.inspect(machine.id)).pid
    templates = []
    for _ in range(3):
        await asyncio.sleep(0.5)
        template, machine = await lab.freeze(machine)
        templates.append(template)
        assert template.pause_s is not None
        assert template.pause_s < 3.0, "generous: it is measured by bench/fork.py"
    before = await count(guest)
    await asyncio.sleep(1)
    assert await count(guest) > before, "the parent went on"
    assert await sh(guest, "cat /run/wrong 2>/dev/null") == ""
    assert (await lab.engine.inspect(machine.id)).pid == pid
    await guest.close()
    counts = []
    for template in templates:
        child, inside = await lab.forked(template)
        first = await count(inside)
        await asyncio.sleep(0.5)
        counts.append((first, await count(inside)))
        assert await sh(inside, "cat /run/wrong 2>/dev/null") == ""
        await inside.close()
        await lab.gone(child.id)
    assert all(later > first for first, later in counts), "each went on from where it was"
    assert [first for first, _ in counts] == sorted({first for first, _ in counts}), "each from its own instant"


async def test_a_fork_that_is_reset_boots(lab: Lab) -> None:
    guest = await lab.booted(machine := lab.machine())
    await sh(guest, "touch /run/before")
    await guest.close()
    template, machine = await lab.freeze(machine)
    await lab.gone(machine.id)
    child, inside = await lab.forked(template)
    assert await sh(inside, "ls /run/before") == "/run/before\n"
    await inside.close()
    await lab.engine.reset(child.id)
    inside = await lab.answer(child.id)
    assert await sh(inside, "ls /run/before 2>/dev/null") == ""
    await inside.close()


async def test_a_fork_of_a_fork_has_what_both_wrote(lab: Lab) -> None:
    guest = await lab.booted(parent := lab.machine(data=MIB))
    await sh(guest, "echo first >/run/first; printf %-512s disk1 | dd of=/dev/vda bs=512 oflag=direct")
    await guest.close()
    first, _ = await lab.freeze(parent)
    child, inside = await lab.forked(first)
    await sh(inside, "echo second >/run/second; printf %-512s disk2 | dd of=/dev/vda bs=512 seek=1 oflag=direct")
    await inside.close()
    second, _ = await lab.freeze(child)
    _, inside = await lab.forked(second)
    said = await sh(inside, "cat /run/first /run/second; dd if=/dev/vda bs=512 count=2 iflag=direct 2>/dev/null")
    assert said.split() == ["first", "second", "disk1", "disk2"]
    await inside.close()
    _, inside = await lab.forked(first)
    assert await sh(inside, "cat /run/second 2>/dev/null") == ""
    await inside.close()


async def test_connections_of_the_parent_go_on_and_a_fork_sends_nothing_before_it_may(lab: Lab) -> None:
    forward = HostForward(protocol="tcp", address="127.0.0.1", host=free_port(), guest=7)
    machine = lab.machine(cards=(msgspec.structs.replace(CARD, forwards=(forward,)),))
    guest = await lab.booted(machine)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as ears:
        await sh(guest, "until ip -4 addr show | grep -q 10.0.2; do sleep 0.1; done")
        await start(guest, f"nc -l -p 7 -e cat & {SEND.format(port=ears.getsockname()[1])}")
        assert await heard(ears), "the parent is heard"
        reader, writer = await connected(forward.host)
        await echoed(reader, writer, b"before\n")
        template, machine = await lab.freeze(machine)
        await echoed(reader, writer, b"after\n")
        writer.close()
        await guest.close()
        await lab.engine.kill(machine.id)
        drain(ears)
        card = Card(name="net0", mac="52:54:00:00:00:02", hostname="child")
        for ahead in (False, True):  # made when it is wanted, and made before
            child = msgspec.structs.replace(lab.fork_of(template), cards=(card,))
            if ahead:
                await lab.engine.warm(child)
            await lab.engine.create(child, warm=ahead)
            await lab.engine.resume(child.id)
            inside = await lab.answer(child.id)
            assert await sh(inside, "cat /sys/class/net/eth0/carrier") == "0\n"
            assert not await heard(ears, 1.0), "a packet before its identity"
            await lab.engine.link(child.id, "net0", True)
            assert await heard(ears, 20), "the fork is heard once it may"
            await inside.close()
            await lab.gone(child.id)
            drain(ears)


async def connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the echo in the guest, once it listens: the first byte comes back."""
    for _ in range(100):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"?\n")
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(1):
                if await reader.readline():
                    return reader, writer
        writer.close()
        await asyncio.sleep(0.1)
    raise AssertionError("nobody listens in the guest")


async def echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes) -> None:
    writer.write(line)
    async with asyncio.timeout(10):
        assert await reader.readline() == line


async def heard(ears: socket.socket, seconds: float = 20) -> bool:
    """A connection comes within this time."""
    ears.settimeout(seconds)
    try:
        (await asyncio.to_thread(ears.accept))[0].close()
    except TimeoutError:
        return False
    return True


def drain(ears: socket.socket) -> None:
    ears.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while True:
            ears.accept()[0].close()


async def test_nothing_that_a_fork_does_changes_its_template(lab: Lab) -> None:
    guest = await lab.booted(machine := lab.machine(data=8 * MIB))
    await sh(
        guest,
        "dd if=/dev/urandom of=/run/load bs=1M count=48 2>/dev/null; dd if=/run/load of=/dev/vda bs=1M count=8 2>/dev/null; sync",
    )
    whole = await sh(guest, "md5sum </run/load")
    await guest.close()
    template, _ = await lab.freeze(machine)
    layer = template.machine.drives[0].path
    disk = layer.read_bytes()
    _sibling, other = await lab.forked(template)
    child, inside = await lab.forked(template)
    pid = (await lab.engine.inspect(child.id)).pid
    assert pid is not None
    await sh(
        inside,
        "dd if=/dev/urandom of=/run/load bs=1M count=48 2>/dev/null; dd if=/dev/urandom of=/dev/vda bs=1M count=8 2>/dev/null; sync",
    )
    full = anonymous(pid)
    await sh(inside, "rm /run/load; sync")  # free page reporting gives back what was freed
    await lab.engine.balloon(child.id, 64 * MIB)
    await until(lambda: anonymous(pid) < full - 24, 30, "the fork's own memory to be given back")
    await lab.engine.balloon(child.id, lab.memory)
    await sh(inside, "dd if=/dev/zero of=/run/more bs=1M count=32 2>/dev/null")
    await inside.close()
    assert await sh(other, "md5sum </run/load") == whole
    kept = await sh(other, "dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | md5sum")
    assert kept == await sh(other, "head -c 8388608 /run/load | md5sum")
    await other.close()
    await lab.engine.kill(child.id)
    assert (checksum(lab, template.id), layer.read_bytes() == disk) == (template.digest, True)
    _third, inside = await lab.forked(template)
    assert await sh(inside, "md5sum </run/load") == whole
    await inside.close()


async def until(condition: object, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}"
        await asyncio.sleep(0.1)


@pytest.mark.skipif(os.geteuid() != 0, reason="without root all VMs are one user")
async def test_a_template_is_readable_by_its_forks_only_and_writable_by_nobody(lab: Lab) -> None:
    guest = await lab.booted(machine := lab.machine(data=MIB))
    await guest.close()
    template, _ = await lab.freeze(machine)
    child, inside = await lab.forked(template)
    await inside.close()
    place = lab.root / "templates" / template.id
    layer = template.machine.drives[0].path
    facts = layer.stat()
    assert (facts.st_uid, facts.st_mode & 0o777) == (0, 0o440)
    assert {path.name: path.stat().st_mode & 0o777 for path in (place / "ram", place / "state")} == {
        "ram": 0o600, "state": 0o600,
    }  # fmt: skip
    other = lab.machine(data=MIB)
    await lab.engine.create(other)
    users = {}
    for name, id in (("parent", machine.id), ("child", child.id), ("other", other.id)):
        pid = (await lab.engine.inspect(id)).pid
        assert pid is not None
        assert writable(pid, facts) == [], f"{name} has the template's disk open for writing"
        users[name] = status(pid)
    assert facts.st_gid in users["child"]
    assert facts.st_gid not in users["other"]
    uid = int(
        next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:")).split()[
            1
        ]
    )
    done = subprocess.run(["cat", str(layer)], user=uid, group=uid, extra_groups=[], capture_output=True, check=False)
    assert b"Permission denied" in done.stderr


def writable(pid: int, facts: os.stat_result) -> list[str]:
    """Descriptors through which a process can write to this file."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.samestat(path.stat(), facts):
            flags = int(Path(f"/proc/{pid}/fdinfo/{path.name}").read_text().split("flags:")[1].split()[0], 8)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                found.append(path.name)
    return found


def status(pid: int) -> list[int]:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Groups:"))
    return [int(group) for group in line.split()[1:]]
