"""Starting a booted guest by forking it, at the level of the engine: what it costs in time, CPU time and memory.

Method. No daemon: a QemuEngine in this process. A guest of the image is booted as often as asked (each time to the agent's answer), the last one is frozen
and goes on. Then forks of it are made: fresh disk, create, resume, ping of the agent; CPU seconds are those of the QEMU process at that moment, memory is `Anonymous` of
smaps_rollup. The pause of the frozen guest is measured again while it writes at a given rate, and printed beside what it wrote meanwhile.
Forks per second: as many at once as there are cores. Image: built before (`corral image build`), found in CORRAL_CACHE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from corral.engine.protocol import Card, Drive, KernelBoot, Layer, Machine, Template
from corral.engine.qemu.engine import QemuEngine
from corral.guest.connect import connect
from corral.guest.protocol import Command, Ended, Guest, Identity
from corral.runtime import Runtime
from corral.storage.seed import Seed, seed_iso

CACHE = Path(os.environ.get("CORRAL_CACHE") or Path(__file__).parents[1] / ".cache")


class Lab:
    """One engine, one image."""

    def __init__(self, root: Path, image: str, memory: int) -> None:
        self.rt, self.root, self.memory = Runtime(), root, memory
        self.engine = QemuEngine(root / "vms", root, self.rt)
        self.image = image_directory(image)
        self.manifest = json.loads((self.image / "manifest.json").read_text())

    def directory(self, id: str) -> Path:
        path = self.root / "vms" / id
        path.mkdir(parents=True)
        for one in (self.root / "vms", path):
            one.chmod(0o711)
        return path

    def machine(self) -> Machine:
        id = self.rt.random.id()
        directory = self.directory(id)
        drives: tuple[Drive, ...] = ()
        if "disk.qcow2" in self.manifest["parts"]:
            layers = (Layer(path=self.image / "disk.qcow2", format="qcow2"),)
            seed = directory / "seed.iso"
            seed.write_bytes(seed_iso(Seed(instance_id=id, hostname="parent", default_user="root")))
            seed.chmod(0o600)
            root = overlay(directory / "root.qcow2", layers)
            drives = (Drive(name="root", path=root, format="qcow2", layers=layers),
                      Drive(name="seed", path=seed, format="raw", readonly=True))  # fmt: skip
        kernel = KernelBoot(
            kernel=self.image / "kernel", initrd=self.image / "initrd", cmdline=self.manifest["cmdline"]
        )
        card = Card(name="net0", mac="52:54:00:00:00:01", hostname="parent")
        return Machine(id=id, name="parent", memory=self.memory, kernel=kernel, drives=drives, cards=(card,))

    async def answer(self, id: str, timeout: float = 120) -> Guest:
        channels = self.engine.channels(id)
        return await connect(channels.guest, channels.qga, self.rt, prefer="resident", timeout=timeout)

    async def freeze(self, machine: Machine) -> tuple[Template, Machine]:
        id = self.rt.random.id()
        drives = {}
        for drive in machine.drives:
            if not drive.readonly:
                path = overlay(drive.path.with_name(f"{drive.name}-{id}.qcow2"), drive.chain)
                drives[drive.name] = msgspec.structs.replace(drive, path=path, format="qcow2", layers=drive.chain)
        template = await self.engine.freeze(machine.id, id, drives)
        after = tuple(drives.get(drive.name, drive) for drive in machine.drives)
        return template, msgspec.structs.replace(machine, drives=after)

    def fork_of(self, template: Template) -> Machine:
        id = self.rt.random.id()
        directory = self.directory(id)
        drives = tuple(
            drive if drive.readonly else msgspec.structs.replace(
                drive, path=overlay(directory / f"{drive.name}.qcow2", drive.chain), format="qcow2", layers=drive.chain
            )
            for drive in template.machine.drives
        )  # fmt: skip
        return msgspec.structs.replace(template.machine, id=id, name="fork", drives=drives, template=template.id)

    async def gone(self, id: str) -> None:
        await self.engine.kill(id)
        await self.engine.remove(id)
        shutil.rmtree(self.root / "vms" / id, ignore_errors=True)


def image_directory(name: str) -> Path:
    """The newest build of an image."""
    found = [
        path.parent for path in CACHE.glob("images/*/manifest.json") if json.loads(path.read_text())["name"] == name
    ]
    assert found, f"no image {name} in {CACHE}: corral image build {name}"
    return max(found, key=lambda path: path.stat().st_mtime)


def overlay(path: Path, layers: tuple[Layer, ...]) -> Path:
    base = layers[0]
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", base.format, "-b", str(base.path), str(path)], check=True
    )
    return path


def cpu_of(pid: int) -> float:
    """CPU seconds of all its threads, by the scheduler's own exact count."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def anonymous(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) >> 10


async def sh(guest: Guest, script: str) -> str:
    process = await guest.run(Command(argv=("sh", "-c", script)))
    text = b""
    try:
        async for piece in process.output():
            if isinstance(piece, Ended):
                return text.decode(errors="replace")
            text += piece.data
    finally:
        await process.close()
    raise AssertionError("the program never ended")


async def cold(lab: Lab, runs: int) -> tuple[list[float], Machine]:
    """Boot ``runs`` guests; the last one stays."""
    took = []
    for number in range(runs):
        began = time.monotonic()
        machine = lab.machine()
        seen = await lab.engine.create(machine)
        await lab.engine.resume(machine.id)
        guest = await lab.answer(machine.id)
        took.append(time.monotonic() - began)
        assert seen.pid is not None
        print(f"cold {took[-1]:.2f} s, CPU {cpu_of(seen.pid):.2f} s, own memory {anonymous(seen.pid)} MiB", flush=True)
        while number == runs - 1 and not (await guest.info()).ready:
            await asyncio.sleep(0.5)
        await guest.close()
        if number < runs - 1:
            await lab.gone(machine.id)
    return took, machine


async def fork(lab: Lab, template: Template, *, identify: bool) -> tuple[dict[str, float], str]:
    """One fork: seconds from the request to each step, CPU seconds and MiB at the end."""
    steps: dict[str, float] = {}
    began = time.monotonic()

    def step(name: str) -> None:
        steps[name] = time.monotonic() - began

    machine = await asyncio.to_thread(lab.fork_of, template)
    step("disk")
    seen = await lab.engine.create(machine)
    step("loaded")
    await lab.engine.resume(machine.id)
    step("runs")
    guest = await lab.answer(machine.id, 30)
    step("answer")
    if identify:
        await guest.identify(
            Identity(
                time=time.time(), seed=os.urandom(64), hostname="fork", machine_id=os.urandom(16).hex(),
                ssh_host_key=b"PRIVATE\n", ssh_host_key_public=b"ssh-ed25519 AAAA\n", mac="52:54:00:12:34:56",
                address="10.0.2.16/24", gateway="10.0.2.2",
            )
        )  # fmt: skip
        await lab.engine.link(machine.id, "net0", True)
        step("identity")
    assert seen.pid is not None
    steps["CPU s"], steps["own MiB"] = cpu_of(seen.pid), anonymous(seen.pid)
    await guest.close()
    return steps, machine.id


async def forks(lab: Lab, template: Template, runs: int) -> dict[str, float]:
    rows = []
    for _ in range(runs + 1):
        steps, id = await fork(lab, template, identify=True)
        rows.append(steps)
        await lab.gone(id)
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}  # the first warms caches


async def rate(lab: Lab, template: Template, count: int, at_once: int) -> float:
    turns = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with turns:
            _, id = await fork(lab, template, identify=True)
            await lab.gone(id)

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.monotonic() - began)


async def pauses(lab: Lab, machine: Machine, runs: int) -> Machine:
    """Freeze a guest again and again, idle and while it writes memory."""
    for script in (
        "",
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=32",
        "while :; do dd if=/dev/urandom of=/dev/shm/x bs=64k count=256; done",
    ):
        guest = await lab.answer(machine.id)
        process = await guest.run(Command(argv=("sh", "-c", f"{script or ':'} 2>/dev/null")))
        await asyncio.sleep(2)
        rows = []
        for _ in range(runs):
            began = time.monotonic()
            template, machine = await lab.freeze(machine)
            rows.append((template.pause_s or 0, template.copied / (1 << 20), time.monotonic() - began))
            await lab.engine.discard(template.id)
        await process.close()
        await guest.close()
        pause, copied, took = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"pause {pause * 1e3:6.1f} ms (longest {max(rows)[0] * 1e3:.1f}), {copied:6.1f} MiB copied in it, {took:.2f} s in all: "
              f"{script or 'idle'}", flush=True)  # fmt: skip
    return machine


@asynccontextmanager
async def lab_of(image: str, memory: int) -> AsyncIterator[Lab]:
    root = Path(tempfile.mkdtemp(prefix="corral-fork-", dir="/tmp"))
    root.chmod(0o711)
    lab = Lab(root, image, memory)
    try:
        yield lab
    finally:
        for seen in await lab.engine.inventory():
            await lab.engine.kill(seen.id)
            await lab.engine.remove(seen.id)
        for template in await lab.engine.templates():
            await lab.engine.discard(template.id)
        await lab.engine.close()
        shutil.rmtree(root)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="micro")
    parser.add_argument("--memory", type=int, default=256, help="MiB (default 256)")
    parser.add_argument("--cold", type=int, default=2, help="cold boots (default 2)")
    parser.add_argument("--runs", type=int, default=10, help="forks one by one (default 10)")
    parser.add_argument("--rate", type=int, default=20, help="forks for the rate (default 20)")
    parser.add_argument("--no-pauses", action="store_true")
    options = parser.parse_args()
    async with lab_of(options.image, options.memory << 20) as lab:
        boots, machine = await cold(lab, options.cold)
        template, machine = await lab.freeze(machine)
        print(
            f"template: pause {(template.pause_s or 0) * 1e3:.1f} ms, {template.copied >> 20} MiB copied in it, {template.disk >> 20} MiB on disk"
        )
        figures = await forks(lab, template, options.runs)
        for name, value in figures.items():
            print(f"  fork {name:9} {value:8.3f}")
        base = statistics.median(boots)
        print(
            f"cold / fork: to the answer {base / figures['answer']:.0f}, to identity {base / figures['identity']:.0f}"
        )
        if options.rate:
            print(
                f"{await rate(lab, template, options.rate, os.cpu_count() or 1):.2f} forks/s with full identity, {os.cpu_count()} at once"
            )
        if not options.no_pauses:
            await pauses(lab, machine, 5)


if __name__ == "__main__":
    asyncio.run(main())
