"""The guests we build, under plain QEMU: how fast they answer, what they do with a seed, how they stop."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.guest.binary import DIRECTORY
from corral.images.files import ImageFiles
from corral.images.store import ImageStore
from corral.runtime import Runtime
from corral.storage.qemu_img import QemuImg
from corral.storage.seed import Seed
from corral.storage.volumes import Volumes
from tests.integration.bare_guest import booted, cache

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

KEY = "ssh-ed25519 " + "A" * 68 + " ada@home"
CLOUD_CONFIG = """#cloud-config
runcmd:
  - echo ran > /root/ran
"""


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def ignore(step: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


async def image(root: Path, recipe: str) -> ImageFiles:
    images = ImageStore(root / "images", cache(), Runtime(), converter=QemuImg(), agent_binaries=DIRECTORY)
    return await images.build(recipe, "x86_64", ignore)


async def test_a_build_is_made_once_and_then_shared(root: Path) -> None:
    first = await image(root / "one", "micro")
    began = time.monotonic()
    second = await image(root / "two", "micro")
    assert time.monotonic() - began < 5  # about half a second on a quiet machine
    assert first.digest == second.digest
    assert first.kernel is not None
    assert second.kernel is not None
    assert first.kernel.stat().st_ino == second.kernel.stat().st_ino or first.kernel.stat().st_nlink == 1
    assert first.min_memory <= 96 << 20


@pytest.mark.parametrize("memory", [96, 512])
async def test_micro_answers_and_is_who_its_seed_says(root: Path, memory: int) -> None:
    files = await image(root, "micro")
    script = "#!/bin/sh\necho user data ran as $(id -un) on $(hostname)\n"
    seed = Seed(instance_id="i-1", hostname="web-1", user_data=script, ssh_keys=(KEY,))
    disk = await Volumes(root / "vms", Runtime()).ensure_seed("vm-1", seed)
    async with booted(files, memory_mib=memory, seed=disk) as guest:
        await guest.ready()
        assert (await guest.guest.info()).hostname == "web-1"
        assert await guest.sh("cat /var/log/corral-init.log") == (0, "user data ran as root on web-1\n")
        assert await guest.sh("cat /root/.ssh/authorized_keys") == (0, KEY + "\n")
        assert "10.0.2.15/24" in (await guest.sh("ip -4 addr show dev eth0"))[1]
        assert "nameserver 10.0.2.3" in (await guest.sh("cat /etc/resolv.conf"))[1]
        assert (await guest.sh("for n in 1 2 3 4 5 6 7 8; do netstat -ltn | grep :22 && break; sleep 1; done"))[0] == 0
        await guest.power_button()
        await guest.ended()


async def test_the_console_of_micro_is_a_shell_that_comes_back(root: Path) -> None:
    async with booted(await image(root, "micro"), memory_mib=128) as guest:
        await guest.ready()
        for number in (1, 2):
            await guest.type(f"echo said-$((40 + {number})); exit\n")
            async with asyncio.timeout(30):
                while f"said-4{number}" not in guest.serial:
                    await asyncio.sleep(0.2)
            await asyncio.sleep(2)  # the shell is started again after a second
        await guest.guest.shutdown()
        await guest.ended()


async def test_micro_says_that_it_skips_cloud_config(root: Path) -> None:
    files = await image(root, "micro")
    seed = Seed(instance_id="i-1", hostname="web-1", user_data=CLOUD_CONFIG)
    disk = await Volumes(root / "vms", Runtime()).ensure_seed("vm-1", seed)
    async with booted(files, memory_mib=96, seed=disk) as guest:
        await guest.ready()
        assert "skipped user data" in guest.serial
