"""The image store: what arrives is checked, converted, whole, shared and read-only; what is bad leaves nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest

from corral.errors import NotFound, Refused
from corral.images.files import ImageFiles
from corral.images.store import ImageStore
from corral.model import ImageSpec
from corral.runtime import Runtime
from corral.storage.qemu_img import QemuImg
from tests.unit.disk_files import iso, qcow2, vmdk
from tests.unit.web_server import Asked, head, serving

MIB = 1 << 20
Format = Literal["", "raw", "qcow2", "vmdk", "iso"]


@pytest.fixture
def root() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def store(root: Path, **options: int) -> ImageStore:
    return ImageStore(
        root / "images",
        root / "cache",
        Runtime(),
        converter=QemuImg(),
        agent_binaries=root,
        allow_loopback=True,
        max_virtual_size=options.get("max_virtual_size", 1 << 41),
    )


def disk(root: Path, format: str, size: int = 2 * MIB) -> bytes:
    """A real disk with something on it."""
    raw, out = root / "raw", root / "out"
    raw.write_bytes(os.urandom(MIB).ljust(size, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, raw, out], check=True)
    return out.read_bytes()


def ignore(step: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


async def pieces(content: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def upload(images: ImageStore, content: bytes, format: Format, checksum: str = "") -> ImageFiles:
    path = await images.receive("upload-1", pieces(content), limit=64 * MIB)
    return await images.accept(path, ImageSpec(format=format, checksum=checksum, description="mine"), ignore)


def leftovers(root: Path) -> list[Path]:
    """Files and half-made directories of the image store."""
    found = (root / "images").rglob("*")
    return [path for path in found if path.is_file() or path.name.startswith(".staging")]


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk"])
async def test_an_upload_becomes_a_qcow2_of_our_own(root: Path, format: Format) -> None:
    images = store(root)
    files = await upload(images, disk(root, format), format)
    assert files.disk is not None
    assert (files.boot, files.disk_format, files.virtual_size, files.agent) == ("disk", "qcow2", 2 * MIB, False)
    back = root / "back"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", files.disk, back], check=True)
    assert back.read_bytes() == (root / "raw").read_bytes()
    assert images.inventory() == [files.digest]
    assert images.files(files.digest) == files
    assert list((root / "images" / ".uploads").iterdir()) == []


async def test_finished_images_can_be_read_by_all_and_written_by_none(root: Path) -> None:
    files = await upload(store(root), disk(root, "raw"), "raw")
    assert files.disk is not None
    assert files.disk.parent.stat().st_mode & 0o777 == 0o711
    assert {path.stat().st_mode & 0o777 for path in files.disk.parent.iterdir()} == {0o444}


async def test_a_cd_is_kept_as_it_is(root: Path) -> None:
    files = await upload(store(root), iso(), "iso")
    assert files.disk is not None
    assert (files.boot, files.disk_format, files.disk.name) == ("cdrom", "raw", "disk.iso")
    assert files.disk.read_bytes() == iso()


async def test_the_same_content_twice_is_one_image(root: Path) -> None:
    images = store(root)
    first = await upload(images, iso(), "iso")
    second = await upload(images, iso(), "iso")
    assert first == second
    assert images.inventory() == [first.digest]


BAD: dict[str, tuple[bytes, Format]] = {
    "a backing file": (qcow2(backing_offset=512, backing_size=11), "qcow2"),
    "a data file": (qcow2(incompatible=4), "qcow2"),
    "tables of garbage": (qcow2()[:65536] + b"\xff" * (3 * 65536), "qcow2"),
    "a vmdk of several files": (vmdk(extents='RW 2048 FLAT "/etc/shadow" 0'), "vmdk"),
    "a disguise": (qcow2(), "raw"),
    "an unaligned size": (bytes(1000), "raw"),
    "nothing": (b"", "raw"),
    "no declared format": (bytes(4096), ""),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_upload_is_refused_and_leaves_nothing(root: Path, what: str) -> None:
    content, format = BAD[what]
    images = store(root)
    with pytest.raises(Refused) as caught:
        await upload(images, content, format)
    assert caught.value.code == "bad-image"
    assert (images.inventory(), leftovers(root)) == ([], [])


async def test_a_bomb_does_not_fill_the_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cluster of the guest's disk is the same one of the file: 32 GiB out of 320 KiB."""
    monkeypatch.setattr("corral.images.convert.FLOOR", 8 * MIB)
    table = b"".join((0x8000000000000000 | 3 * 65536).to_bytes(8, "big") for _ in range(8192))
    size = 32 << 30
    l1 = b"".join((0x8000000000000000 | 4 * 65536).to_bytes(8, "big") for _ in range(size // (65536 * 8192)))
    head_ = qcow2(size=size, l1_entries=64, l1_offset=2 * 65536, pad=65536)
    content = head_ + bytes(65536) + l1.ljust(65536, b"\0") + b"B" * 65536 + table
    images = store(root)
    with pytest.raises(Refused, match=r"File too large|signal") as caught:
        await upload(images, content, "qcow2")
    assert caught.value.code == "bad-image"
    assert (images.inventory(), leftovers(root)) == ([], [])


async def test_an_upload_that_is_too_large_or_breaks_off_leaves_nothing(root: Path) -> None:
    images = store(root)
    with pytest.raises(Refused, match="larger than 1M") as caught:
        await images.receive("upload-1", pieces(bytes(2 * MIB)), limit=MIB)
    assert caught.value.code == "too-large"

    async def breaks() -> AsyncIterator[bytes]:
        yield bytes(1000)
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        await images.receive("upload-1", breaks(), limit=MIB)
    assert list((root / "images" / ".uploads").iterdir()) == []


async def test_a_stated_checksum_is_checked(root: Path) -> None:
    content = iso()
    good = "sha256:" + hashlib.sha256(content).hexdigest()
    assert (await upload(store(root), content, "iso", good)).boot == "cdrom"
    with pytest.raises(Refused, match="checksum"):
        await upload(store(root), content + bytes(2048), "iso", good)


async def test_somebody_elses_file_is_copied_before_it_is_looked_at(root: Path) -> None:
    theirs = root / "theirs.img"
    theirs.write_bytes(disk(root, "raw"))
    files = await store(root).accept(theirs, ImageSpec(format="raw"), ignore)
    assert theirs.exists()
    assert files.virtual_size == 2 * MIB
    link = root / "link.img"
    link.symlink_to("/etc/passwd")
    fifo = root / "fifo"
    os.mkfifo(fifo)
    for path in (link, fifo, root, root / "missing", Path("/dev/zero")):
        with pytest.raises(Refused) as caught:
            await store(root).accept(path, ImageSpec(format="raw"), ignore)
        assert caught.value.code == "bad-image"


async def test_the_size_limit_is_the_stores(root: Path) -> None:
    with pytest.raises(Refused, match="would have"):
        await upload(store(root, max_virtual_size=MIB), disk(root, "raw"), "raw")


async def test_an_image_that_lost_a_file_is_not_there(root: Path) -> None:
    images = store(root)
    files = await upload(images, iso(), "iso")
    assert files.disk is not None
    files.disk.unlink()
    with pytest.raises(NotFound, match=r"lost its file disk\.iso"):
        images.files(files.digest)
    for digest in ("", "..", "0" * 64):
        with pytest.raises(NotFound):
            images.files(digest)


async def test_removing_is_for_good_and_may_be_repeated(root: Path) -> None:
    images = store(root)
    files = await upload(images, iso(), "iso")
    await images.remove(files.digest)
    await images.remove(files.digest)
    assert images.inventory() == []
    assert not (root / "images" / files.digest).exists()


async def test_a_sweep_clears_what_a_kill_left_and_keeps_the_rest(root: Path) -> None:
    images = store(root)
    files = await upload(images, iso(), "iso")
    (root / "images" / ".staging-dead").mkdir()
    (root / "images" / ".staging-dead" / "kernel").write_bytes(b"half")
    (root / "images" / ".downloads").mkdir(exist_ok=True)
    (root / "images" / ".downloads" / "x.part").write_bytes(b"half")
    assert images.inventory() == [files.digest]
    images.sweep()
    assert not (root / "images" / ".staging-dead").exists()
    assert (root / "images" / ".downloads" / "x.part").exists()
    assert images.inventory() == [files.digest]


async def test_a_url_becomes_an_image_and_the_download_goes(root: Path) -> None:
    content = disk(root, "qcow2")

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, Content_Length=len(content)) + content)

    steps: list[str] = []
    async with serving(answer) as web:
        spec = ImageSpec(
            source="url", url=web.url(), format="qcow2", checksum="sha256:" + hashlib.sha256(content).hexdigest()
        )
        files = await store(root).fetch(spec, lambda step, done, total: steps.append(step))
    assert files.virtual_size == 2 * MIB
    assert list((root / "images" / ".downloads").iterdir()) == []
    assert list(dict.fromkeys(steps)) == [
        "downloading", "checking the checksum", "checking the header", "converting the disk", "measuring the image",
    ]  # fmt: skip


async def test_a_mirror_of_a_catalogue_entry_keeps_what_the_catalogue_knows(root: Path) -> None:
    content = disk(root, "qcow2")
    checksum = "sha512:" + hashlib.sha512(content).hexdigest()

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, Content_Length=len(content)) + content)

    async with serving(answer) as web:
        spec = ImageSpec(source="catalogue", recipe="debian-13", url=web.url(), checksum=checksum)
        files = await store(root).fetch(spec, ignore)
    assert (files.name, files.default_user, files.min_memory) == ("debian-13", "debian", 256 * MIB)


async def test_a_bad_download_is_thrown_away(root: Path) -> None:
    content = qcow2(incompatible=4)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, Content_Length=len(content)) + content)

    async with serving(answer) as web:
        with pytest.raises(Refused, match="another file"):
            await store(root).fetch(ImageSpec(source="url", url=web.url(), format="qcow2"), ignore)
    assert list((root / "images" / ".downloads").iterdir()) == []


async def test_recipes_and_architectures_that_do_not_exist_here(root: Path) -> None:
    with pytest.raises(Refused, match="no recipe"):
        await store(root).build("windows", "x86_64", ignore)
    with pytest.raises(Refused, match="cannot be built"):
        await store(root).build("micro", "riscv64", ignore)
    with pytest.raises(NotFound, match="catalogue"):
        await store(root).fetch(ImageSpec(source="catalogue", recipe="windows"), ignore)
