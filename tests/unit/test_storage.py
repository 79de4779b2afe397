"""Volumes, seeds and the one qemu-img: idempotent, whole or not there, and deaf to what a guest writes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Literal

import msgspec
import pycdlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import CorralError, Invalid, Refused
from corral.runtime import Runtime
from corral.storage.qemu_img import QemuImg
from corral.storage.seed import MAX_USER_DATA, Seed, seed_files, seed_iso
from corral.storage.volumes import Volumes

MIB = 1 << 20
KEY = "ssh-ed25519 " + "A" * 68 + " ada@home"


class Base(msgspec.Struct):
    """An image, as far as volumes look at it."""

    disk: Path | None
    name: str = "debian"
    disk_format: Literal["qcow2", "raw"] = "qcow2"
    boot: Literal["kernel", "disk", "cdrom"] = "disk"
    virtual_size: int = 8 * MIB


@pytest.fixture
def base(tmp_path: Path) -> Base:
    disk = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"], check=True)
    return Base(disk)


def volumes(tmp_path: Path) -> Volumes:
    return Volumes(tmp_path / "vms", Runtime())


def look(path: Path) -> dict[str, object]:
    argv = ["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)]
    answer: dict[str, object] = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return answer


async def test_a_root_disk_is_an_overlay_that_names_its_bases_format(tmp_path: Path, base: Base) -> None:
    root = await volumes(tmp_path).ensure_root("vm-1", base, None)
    seen = look(root)
    assert (seen["full-backing-filename"], seen["backing-filename-format"]) == (str(base.disk), "qcow2")
    assert seen["virtual-size"] == 8 * MIB
    assert root.stat().st_mode & 0o777 == 0o600


async def test_asking_again_keeps_the_disk_and_grows_it_when_wanted(tmp_path: Path, base: Base) -> None:
    disks = volumes(tmp_path)
    root = await disks.ensure_root("vm-1", base, None)
    inode = root.stat().st_ino
    assert await disks.ensure_root("vm-1", base, None) == root
    await disks.ensure_root("vm-1", base, 32 * MIB)
    assert (root.stat().st_ino, look(root)["virtual-size"]) == (inode, 32 * MIB)
    await disks.ensure_root("vm-1", base, 16 * MIB)
    assert look(root)["virtual-size"] == 32 * MIB  # never shrunk


async def test_a_disk_below_the_images_size_is_refused(tmp_path: Path, base: Base) -> None:
    with pytest.raises(Refused, match="has 8M"):
        await volumes(tmp_path).ensure_root("vm-1", base, 4 * MIB)
    assert volumes(tmp_path).inventory() == []


async def test_an_image_without_disk_gives_no_volume_and_a_cd_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no disk"):
        await volumes(tmp_path).ensure_root("vm-1", Base(None, boot="kernel"), None)

    cd = Base(tmp_path / "cd.iso", boot="cdrom", disk_format="raw", virtual_size=600 * MIB)
    root = await volumes(tmp_path).ensure_root("vm-1", cd, 64 * MIB)
    assert look(root)["virtual-size"] == 64 * MIB
    assert "full-backing-filename" not in look(root)


async def test_a_disk_that_was_there_is_never_replaced_by_an_empty_one(tmp_path: Path, base: Base) -> None:
    disks = volumes(tmp_path)
    root = await disks.ensure_root("vm-1", base, None)
    root.unlink()
    with pytest.raises(Refused, match="is gone"):
        await disks.ensure_root("vm-1", base, None, new=False)
    assert not root.exists()


async def test_what_was_prepared_for_a_fork_is_not_booted_from(tmp_path: Path, base: Base) -> None:
    template = tmp_path / "template.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.disk, template], check=True)
    disks = volumes(tmp_path)
    await disks.ensure_fork("a", [template], None)
    assert [layer.name for layer in disks.layers("a")] == ["root.qcow2", "base-1.qcow2"]
    await disks.ensure_root("a", base, None)
    (root,) = disks.layers("a")
    assert json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", root]))["backing-filename"] == str(
        base.disk
    )


async def test_a_layer_that_was_not_used_is_given_again(tmp_path: Path, base: Base) -> None:
    disks = volumes(tmp_path)
    root = await disks.ensure_root("vm-1", base, None)
    first = await disks.next_layer("vm-1", root)
    assert [layer.name for layer in first] == ["root-2.qcow2", "root.qcow2"]
    assert await disks.next_layer("vm-1", root) == first
    second = await disks.next_layer("vm-1", first[0])
    assert [layer.name for layer in second] == ["root-3.qcow2", "root-2.qcow2", "root.qcow2"]
    with pytest.raises(CorralError, match="writes to root"):
        await disks.next_layer("vm-1", root)


async def test_what_a_killed_process_left_is_cleared_and_never_taken_for_a_disk(tmp_path: Path, base: Base) -> None:
    disks = volumes(tmp_path)
    left = disks.path("vm-1") / ".new-root.qcow2-deadbeef"
    left.write_bytes(b"half a disk")
    root = await disks.ensure_root("vm-1", base, None)
    assert sorted(path.name for path in root.parent.iterdir()) == ["root.qcow2"]
    assert look(root)["virtual-size"] == 8 * MIB


async def test_a_failed_creation_leaves_nothing(tmp_path: Path) -> None:
    disks = volumes(tmp_path)
    with pytest.raises(CorralError):
        await disks.ensure_root("vm-1", Base(tmp_path / "missing.qcow2"), None)
    assert list(disks.path("vm-1").iterdir()) == []


async def test_a_header_that_a_guest_wrote_is_never_believed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(MIB, b"\0"))
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, raw], check=True)
    seen = await QemuImg().info(raw, "raw")  # its content is a qcow2 with a backing file; its format is raw
    assert (seen.format, seen.full_backing_filename) == ("raw", "")
    await QemuImg().convert(raw, "raw", tmp_path / "out.qcow2", max_bytes=64 * MIB)
    back = tmp_path / "back.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", tmp_path / "out.qcow2", back], check=True)
    assert back.read_bytes()[:4] == b"QFI\xfb"


async def test_a_conversion_that_grows_beyond_its_limit_ends(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(4 * MIB))
    with pytest.raises(CorralError, match="converting"):
        await QemuImg().convert(source, "raw", tmp_path / "out.qcow2", max_bytes=MIB)
    assert not (tmp_path / "out.qcow2").exists() or (tmp_path / "out.qcow2").stat().st_size <= MIB


async def test_a_name_that_is_a_protocol_elsewhere_is_only_a_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="absolute"):
        await QemuImg().info(Path("json:{}"), "qcow2")
    with pytest.raises(CorralError, match="No such file"):
        await QemuImg().info(tmp_path / "nbd:localhost", "qcow2")


async def test_used_counts_all_files_and_remove_leaves_none(tmp_path: Path, base: Base) -> None:
    disks = volumes(tmp_path)
    root = await disks.ensure_root("vm-1", base, None)
    (root.parent / "run").mkdir()
    (root.parent / "run" / "log").write_bytes(os.urandom(MIB))
    assert await disks.used("vm-1") >= MIB
    assert disks.inventory() == ["vm-1"]
    await disks.remove("vm-1")
    await disks.remove("vm-1")
    assert (disks.inventory(), await disks.used("vm-1")) == ([], 0)


@pytest.mark.parametrize("id", ["", "..", "a/b", "../x", "a\n", ".hidden", "x" * 65])
async def test_ids_that_are_no_directory_names(tmp_path: Path, base: Base, id: str) -> None:
    with pytest.raises(CorralError, match="not the id"):
        await volumes(tmp_path).ensure_root(id, base, None)
    assert not (tmp_path / "vms").exists()


def mounted(iso: bytes, tmp_path: Path) -> dict[str, bytes]:
    """The files of a CD by their real (Rock Ridge) names."""
    path = tmp_path / "seed.iso"
    path.write_bytes(iso)
    cd = pycdlib.PyCdlib()
    cd.open(str(path))
    assert cd.pvd.volume_identifier.rstrip() == b"cidata"
    found = {}
    for folder, _, names in cd.walk(rr_path="/"):
        for name in names:
            target = tmp_path / "piece"
            cd.get_file_from_iso(str(target), rr_path=f"{folder.rstrip('/')}/{name}")
            found[f"{folder.strip('/')}/{name}".lstrip("/")] = target.read_bytes()
    cd.close()
    return found


async def test_a_seed_says_who_the_guest_is(tmp_path: Path) -> None:
    seed = Seed(
        instance_id="i-1", hostname="web-1", user_data="#!/bin/sh\ntrue\n", ssh_keys=(KEY,), default_user="debian"
    )
    path = await volumes(tmp_path).ensure_seed("vm-1", seed)
    files = mounted(path.read_bytes(), tmp_path)
    assert json.loads(files["meta-data"]) == {"instance-id": "i-1", "local-hostname": "web-1", "public-keys": [KEY]}
    assert files["user-data"] == files["corral/user-data"] == b"#!/bin/sh\ntrue\n"
    assert files["corral/authorized_keys"] == KEY.encode() + b"\n"
    assert files["corral/hostname"] == b"web-1\n"
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_seed_is_written_again_only_when_it_says_something_else(tmp_path: Path) -> None:
    disks, seed = volumes(tmp_path), Seed(instance_id="i-1", hostname="web-1")
    path = await disks.ensure_seed("vm-1", seed)
    inode = path.stat().st_ino
    await disks.ensure_seed("vm-1", seed)
    assert path.stat().st_ino == inode
    await disks.ensure_seed("vm-1", msgspec.structs.replace(seed, hostname="web-2"))
    assert mounted(path.read_bytes(), tmp_path)["corral/hostname"] == b"web-2\n"


BAD_SEEDS: dict[str, dict[str, object]] = {
    "hostname": {"hostname": "web\nruncmd: [reboot]"},
    "hostname empty": {"hostname": ""},
    "hostname upper": {"hostname": "Web"},
    "hostname dots": {"hostname": "../../etc"},
    "hostname long": {"hostname": "a" * 64},
    "hostname dash": {"hostname": "-web"},
    "hostname end": {"hostname": "web\n"},
    "instance_id": {"instance_id": "a b"},
    "default_user": {"default_user": "root\nssh"},
    "key options": {"ssh_keys": (f'command="rm -rf /" {KEY}',)},
    "key two lines": {"ssh_keys": (f"{KEY}\n{KEY}",)},
    "key nul": {"ssh_keys": (f"{KEY}\0",)},
    "key private": {"ssh_keys": ("-----BEGIN OPENSSH PRIVATE KEY-----",)},
    "key empty": {"ssh_keys": ("",)},
    "keys many": {"ssh_keys": (KEY,) * 1000},
    "user_data nul": {"user_data": "#!/bin/sh\0"},
    "user_data large": {"user_data": "x" * (MAX_USER_DATA + 1)},
    "user_data surrogate": {"user_data": "\udc80"},
}


@pytest.mark.parametrize("what", BAD_SEEDS)
async def test_a_seed_with_this_is_refused_and_nothing_written(tmp_path: Path, what: str) -> None:
    seed = msgspec.structs.replace(Seed(instance_id="i-1", hostname="web-1"), **BAD_SEEDS[what])
    with pytest.raises(Invalid) as caught:
        await volumes(tmp_path).ensure_seed("vm-1", seed)
    assert caught.value.problems[0].field.startswith(next(iter(BAD_SEEDS[what])))
    assert not list(tmp_path.rglob("seed.iso*"))


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        seed_iso(Seed(instance_id="", hostname="", ssh_keys=("x", "y"), default_user=""))
    assert len(caught.value.problems) == 5


@settings(max_examples=200, deadline=None)
@given(hostname=st.text(max_size=80), key=st.text(max_size=80), user_data=st.text(max_size=80))
def test_nothing_typed_becomes_another_line(hostname: str, key: str, user_data: str) -> None:
    seed = Seed(instance_id="i", hostname=hostname, ssh_keys=(key, KEY), user_data=user_data)
    try:
        files = seed_files(seed)
    except Invalid:
        return
    assert json.loads(files["meta-data"])["local-hostname"] == hostname
    assert files["corral/hostname"].count(b"\n") == 1
    assert files["corral/authorized_keys"].count(b"\n") == 2


async def test_many_at_once_do_not_disturb_each_other(tmp_path: Path, base: Base) -> None:
    disks = volumes(tmp_path)
    roots = await asyncio.gather(*(disks.ensure_root(f"vm-{n}", base, None) for n in range(8)))
    assert len({root.stat().st_ino for root in roots}) == 8
