"""Limits of a real disk, measured by the guest: reached and kept within a few per cent, changed and lifted while it runs."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from corral.engine.protocol import Drive, KernelBoot, Limits, Machine
from corral.engine.qemu.engine import QemuEngine
from corral.guest.binary import DIRECTORY
from corral.guest.connect import connect
from corral.guest.protocol import Guest
from corral.images.store import ImageStore
from corral.runtime import Runtime
from corral.storage.qemu_img import QemuImg
from corral.units import KIB, MIB
from tests.integration.agent_on_host import run
from tests.integration.bare_guest import cache
from tests.probed import as_probed

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]
BETWEEN = "read a x </proc/uptime; {work}; read b x </proc/uptime; echo $a $b"


class Limited:
    """A guest with a disk of its own that can be limited; what it does is timed by its own clock."""

    def __init__(self, engine: QemuEngine, id: str, guest: Guest) -> None:
        self.engine, self.id, self.guest = engine, id, guest

    async def limit(self, limits: Limits) -> None:
        await self.engine.throttle(self.id, "root", limits)

    async def seconds(self, count: int, block: int, *, write: bool = False, at_once: int = 1) -> float:
        """What ``count`` direct reads or writes of ``block`` bytes take, one after the other, by ``at_once`` programs."""
        ends = "if=/dev/zero of=/dev/vda oflag=direct" if write else "if=/dev/vda of=/dev/null iflag=direct"
        each = f"dd {ends} bs={block} count={count} 2>/dev/null"
        work = BETWEEN.format(work=each if at_once == 1 else f"{each} & " * at_once + "wait")
        async with asyncio.timeout(60):
            status, out, errors = await run(self.guest, "sh", "-c", work)
        assert status == 0, errors
        began, ended = map(float, out.split())
        return ended - began

    async def rate(self, count: int, block: int, *, write: bool = False, warm: int = 0) -> float:
        """Requests a second; ``warm``: requests before, which use up what may be saved up."""
        if warm:
            await self.seconds(warm, block, write=write)
        return count / await self.seconds(count, block, write=write)


@asynccontextmanager
async def machine(limits: Limits, size: int = 64 * MIB) -> AsyncIterator[Limited]:
    root, rt = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp")), Runtime()
    root.chmod(0o711)
    as_probed(root)
    images = ImageStore(root / "images", cache(), rt, converter=QemuImg(), agent_binaries=DIRECTORY)
    engine = QemuEngine(root / "vms", root, rt)
    id = rt.random.id()
    try:
        micro = await images.build("micro", "x86_64", lambda step, done, total: None)
        assert micro.kernel is not None
        directory = root / "vms" / id
        directory.mkdir(parents=True, mode=0o711)
        with (directory / "root.raw").open("wb") as file:
            file.truncate(size)
        kernel = KernelBoot(kernel=micro.kernel, initrd=micro.initrd, cmdline=micro.cmdline)
        drive = Drive(name="root", path=directory / "root.raw", format="raw", limits=limits)
        await engine.create(Machine(id=id, name="slow", memory=128 * MIB, kernel=kernel, drives=(drive,)))
        await engine.resume(id)
        channels = engine.channels(id)
        guest = await connect(channels.guest, channels.qga, rt, prefer="resident", timeout=90)
        try:
            async with asyncio.timeout(60):
                while not (await guest.info()).ready:
                    await asyncio.sleep(0.3)
            yield Limited(engine, id, guest)
        finally:
            await guest.close()
    finally:
        await engine.kill(id)
        await engine.close()
        shutil.rmtree(root)


async def keeps(vm: Limited, wanted: float, count: int, block: int, *, write: bool = False, warm: int = 0) -> None:
    """The guest gets ``wanted`` requests a second, never more. A busy host may hold it up: then it is asked again."""
    seen: list[float] = []
    for _ in range(3):
        seen.append(await vm.rate(count, block, write=write, warm=warm))
        assert seen[-1] <= wanted * 1.1, f"{seen[-1]:.1f} a second, limited to {wanted:.1f}"
        if seen[-1] >= wanted * 0.9:
            return
    raise AssertionError(f"{seen} a second, limited to {wanted:.1f}")


async def test_a_guest_gets_what_its_limits_say_and_all_of_it_when_they_are_lifted() -> None:
    async with machine(Limits(iops=200)) as vm:
        await keeps(vm, 200, 600, 4096, warm=40)
        await vm.limit(Limits(iops=400))
        await keeps(vm, 400, 1200, 4096, write=True, warm=80)
        await vm.limit(Limits(bandwidth=4 * MIB))
        await keeps(vm, 64, 192, 64 * KIB, warm=20)
        await vm.limit(Limits(iops=1000, bandwidth=2 * MIB))
        await keeps(vm, 8, 24, 256 * KIB, write=True, warm=4)

        before = (await vm.engine.stats(vm.id)).drives[0]
        await vm.limit(Limits())
        free = await vm.rate(2000, 4096)
        assert free > 800, "twice the highest limit; an idle host reaches thousands"
        after = (await vm.engine.stats(vm.id)).drives[0]
        assert (after.reads - before.reads, after.read - before.read) == (2000, 2000 * 4096)
        assert after.failed == 0


async def test_a_burst_lasts_as_long_as_its_credit() -> None:
    async with machine(Limits()) as vm:
        # 800 requests of credit, at 400 a second while 100 are earned: gone after 800 / 300 s, 1067 requests.
        await vm.limit(Limits(iops=100, iops_burst=400, burst_s=2))
        burst = await vm.rate(900, 4096)
        assert 200 < burst <= 440, "far beyond the limit, and no faster than the burst"
        await vm.seconds(250, 4096)
        await keeps(vm, 100, 300, 4096)
