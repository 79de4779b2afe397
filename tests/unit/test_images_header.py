"""The header check: what a stranger's disk file may say before QEMU opens it."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import Refused
from corral.images.header import MAX_VIRTUAL_SIZE, Header, check_header
from tests.unit.disk_files import CLUSTER, GIB, extension, iso, qcow2, vmdk

FOREIGN = {
    "QED": b"QED\0".ljust(65536, b"\0"),
    "VHDX": b"vhdxfile".ljust(65536, b"\0"),
    "VHD": b"conectix".ljust(65536, b"\0"),
    "VDI": (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe").ljust(65536, b"\0"),
    "LUKS": b"LUKS\xba\xbe\0\x01".ljust(65536, b"\0"),
    "qcow2": qcow2(),
    "VMDK": vmdk().ljust(131072, b"\0"),
}
PACKED = {
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bzip2": b"BZh9",
    "zip": b"PK\x03\x04",
    "tar": b"disk.ovf".ljust(257, b"\0") + b"ustar\0",
}


def check(content: bytes, declared: str, limit: int = MAX_VIRTUAL_SIZE) -> Header:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return check_header(file.fileno(), declared, limit)


def refusal(content: bytes, declared: str, limit: int = MAX_VIRTUAL_SIZE) -> str:
    with pytest.raises(Refused) as caught:
        check(content, declared, limit)
    assert caught.value.code == "bad-image"
    return caught.value.message


def test_good_headers_pass_with_their_size() -> None:
    assert check(qcow2(), "qcow2") == Header("qcow2", GIB)
    assert check(qcow2(version=2), "qcow2") == Header("qcow2", GIB)
    assert check(vmdk(), "vmdk") == Header("vmdk", 1 << 20)
    assert check(vmdk(kind="streamOptimized"), "vmdk") == Header("vmdk", 1 << 20)
    assert check(bytes(4096), "raw") == Header("raw", 4096)
    assert check(iso(), "iso") == Header("iso", 20 * 2048)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", ""), ("qcow2", "compat=0.10"), ("qcow2", "cluster_size=2M"), ("qcow2", "cluster_size=512"),
        ("qcow2", "extended_l2=on"), ("qcow2", "compression_type=zstd"), ("qcow2", "lazy_refcounts=on"),
        ("vmdk", ""), ("vmdk", "subformat=streamOptimized"),
    ],
)  # fmt: skip
def test_what_qemu_img_makes_passes(tmp_path: Path, format: str, options: str) -> None:
    source, disk = tmp_path / "source", tmp_path / "disk"
    source.write_bytes(os.urandom(1 << 20) + bytes(1 << 20))
    argv = ["qemu-img", "convert", "-f", "raw", "-O", format, *(["-o", options] if options else []), source, disk]
    subprocess.run(argv, check=True, capture_output=True)
    assert check(disk.read_bytes(), format) == Header(format, 2 << 20)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"])
def test_vmdks_in_several_files_are_refused(tmp_path: Path, subformat: str) -> None:
    disk = tmp_path / "disk.vmdk"
    argv = ["qemu-img", "create", "-f", "vmdk", "-o", f"subformat={subformat}", disk, "1M"]
    subprocess.run(argv, check=True, capture_output=True)
    for file in tmp_path.iterdir():
        if file.stat().st_size:
            refusal(file.read_bytes(), "vmdk")


BAD_QCOW2: dict[str, tuple[bytes, str]] = {
    "a backing file": (qcow2(backing_offset=512, backing_size=11), "backing file"),
    "a backing file with size 0": (qcow2(backing_offset=512), "backing file"),
    "a backing file's name without place": (qcow2(backing_size=11), "backing file"),
    "a backing format": (qcow2(extensions=extension(0xE2792ACA, b"raw")), "backing file"),
    "a data file bit": (qcow2(incompatible=4), "another file"),
    "a data file's name": (qcow2(extensions=extension(0x44415441, b"/etc/shadow")), "data file"),
    "the corrupt bit": (qcow2(incompatible=2), "corrupt"),
    "an unknown bit": (qcow2(incompatible=1 << 63), "unknown features"),
    "version 1": (qcow2(version=1), "version 1"),
    "version 99": (qcow2(version=99), "version 99"),
    "encryption": (qcow2(crypt=2), "encrypted"),
    "an encryption header": (qcow2(extensions=extension(0x0537BE77, bytes(16))), "encrypted"),
    "size 0": (qcow2(size=0), "size 0"),
    "size 2^63-1": (qcow2(size=2**63 - 1), "would have"),
    "size 2^64-1": (qcow2(size=2**64 - 1), "would have"),
    "an unaligned size": (qcow2(size=GIB + 1), "multiple of 512"),
    "clusters of 1 byte": (qcow2(cluster_bits=0), "cluster size"),
    "clusters of 2^31": (qcow2(cluster_bits=31), "cluster size"),
    "clusters of 2^(2^32-1)": (qcow2(cluster_bits=2**32 - 1), "cluster size"),
    "no L1 table": (qcow2(l1_entries=0), "too small"),
    "an L1 table of 2^32-1 entries": (qcow2(l1_entries=2**32 - 1), "L1 table"),
    "an L1 table in the header": (qcow2(l1_offset=0), "L1 table"),
    "an L1 table off a cluster": (qcow2(l1_offset=3 * CLUSTER + 8), "L1 table"),
    "an L1 table beyond the file": (qcow2(l1_offset=2**48), "L1 table"),
    "an L1 table at 2^64-65536": (qcow2(l1_offset=2**64 - 65536), "L1 table"),
    "no refcount table": (qcow2(refcount_clusters=0), "refcount table"),
    "a refcount table of 2^32-1 clusters": (qcow2(refcount_clusters=2**32 - 1), "refcount table"),
    "a refcount table beyond the file": (qcow2(refcount_offset=2**62), "refcount table"),
    "2^32-1 snapshots": (qcow2(snapshots=2**32 - 1), "snapshots"),
    "one snapshot": (qcow2(snapshots=1), "snapshots"),
    "refcounts of 2^40 bits": (qcow2(refcount_order=40), "reference count"),
    "a header of 0 bytes": (qcow2(length=0), "header cannot"),
    "a header of 2^32-8 bytes": (qcow2(length=2**32 - 8), "header cannot"),
    "an unknown compression": (qcow2(incompatible=8, compression=7), "compression"),
    "zstd without its bit": (qcow2(compression=1), "compression"),
    "endless extensions": (qcow2(extensions=extension(1, bytes(65520))), "do not end"),
    "an extension of 2^32-1 bytes": (qcow2(extensions=struct.pack(">II", 1, 2**32 - 1)), "do not end"),
    "extended L2 with tiny clusters": (qcow2(incompatible=16, cluster_bits=9, size=65536), "extended L2"),
    "no qcow2 at all": (bytes(65536), "not a qcow2"),
}


@pytest.mark.parametrize("lie", BAD_QCOW2)
def test_a_qcow2_with_this_is_refused(lie: str) -> None:
    content, words = BAD_QCOW2[lie]
    assert words in refusal(content, "qcow2")


BAD_VMDK: dict[str, tuple[bytes, str]] = {
    "a flat extent with a path": (vmdk(extents='RW 2048 FLAT "/etc/shadow" 0'), "other files"),
    "a sparse extent with a path": (vmdk(extents='RW 2048 SPARSE "../../secret.vmdk"'), "path"),
    "two extents": (vmdk(extents='RW 1024 SPARSE "a.vmdk"\nRW 1024 SPARSE "b.vmdk"'), "other files"),
    "no extent": (vmdk(extents=""), "other files"),
    "an extent of another size": (vmdk(extents='RW 4096 SPARSE "disk.vmdk"'), "disagree"),
    "an extent that cannot be read": (vmdk(extents='RW many SPARSE "disk.vmdk"'), "cannot be read"),
    "a split type": (vmdk(kind="twoGbMaxExtentSparse"), "not supported"),
    "a parent": (vmdk(descriptor='createType="monolithicSparse"\nparentCID=1\nRW 2048 SPARSE "a"'), "parent"),
    "a parent's name": (
        vmdk(descriptor='createType="monolithicSparse"\nparentFileNameHint="/etc/passwd"\nRW 2048 SPARSE "a"'),
        "parent",
    ),
    "only a descriptor": (b"# Disk DescriptorFile\nversion=1\n".ljust(65536, b"\0"), "other files"),
    "no descriptor": (vmdk(descriptor_at=0, descriptor_size=0), "split"),
    "a descriptor of 2^60 sectors": (vmdk(descriptor_size=2**60), "split"),
    "a descriptor beyond the file": (vmdk(descriptor_at=2**40), "too short"),
    "capacity 0": (vmdk(capacity=0), "size 0"),
    "capacity 2^63": (vmdk(capacity=2**63), "would have"),
    "version 99": (vmdk(version=99), "version 99"),
    "a grain of 0": (vmdk(grain=0), "grain"),
    "a grain of 2^60": (vmdk(grain=2**60), "grain"),
    "tables of 2^32-1": (vmdk(entries=2**32 - 1), "tables"),
    "an unknown compression": (vmdk(algorithm=9), "compression"),
    "a directory beyond the file": (vmdk(directory=2**50), "directory"),
    "a footer of another size": (vmdk(kind="streamOptimized", footer={"capacity": 1 << 40}), "footer"),
    "a footer with another descriptor": (vmdk(kind="streamOptimized", footer={"descriptor_at": 5}), "footer"),
    "a footer's directory beyond": (vmdk(kind="streamOptimized", footer={"directory": 2**50}), "directory"),
    "a cut off stream": (vmdk(kind="streamOptimized")[:-512], "footer"),
    "a directory at the end without markers": (vmdk(directory=2**64 - 1), "markers"),
}


@pytest.mark.parametrize("lie", BAD_VMDK)
def test_a_vmdk_with_this_is_refused(lie: str) -> None:
    content, words = BAD_VMDK[lie]
    assert words in refusal(content, "vmdk")


@pytest.mark.parametrize("name", FOREIGN)
def test_declared_raw_and_is_something_else(name: str) -> None:
    assert f"begins like {name}" in refusal(FOREIGN[name], "raw")


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("declared", ["raw", "qcow2", "vmdk", "iso"])
def test_packed_files_are_refused_and_never_unpacked(name: str, declared: str) -> None:
    assert f"packed ({name})" in refusal(PACKED[name].ljust(65536, b"\0"), declared)


@pytest.mark.parametrize("declared", ["raw", "qcow2", "vmdk", "iso"])
@pytest.mark.parametrize("size", [0, 3, 72])
def test_tiny_files_are_refused(declared: str, size: int) -> None:
    refusal(qcow2()[:size], declared)
    refusal(vmdk()[:size], declared)
    refusal(bytes(size), declared)


def test_a_cd_that_is_also_a_disk_is_refused() -> None:
    polyglot = bytearray(iso())
    for magic, words in ((b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK")):
        polyglot[:4] = magic
        assert words in refusal(bytes(polyglot), "iso")
    both = qcow2()[:1024] + iso()[1024:] + bytes(4 * CLUSTER)
    assert "CD as well" in refusal(both, "qcow2")


def test_a_cd_that_is_cut_off_or_none_is_refused() -> None:
    assert "should have 21 blocks" in refusal(iso(blocks=21), "iso")
    assert "should have 0 blocks" in refusal(iso(blocks=0), "iso")
    assert "not a CD" in refusal(bytes(65536), "iso")


def test_the_size_limit_holds_for_every_format() -> None:
    for content, declared in ((qcow2(), "qcow2"), (vmdk(), "vmdk"), (bytes(4096), "raw"), (iso(), "iso")):
        assert "bytes" in refusal(content, declared, limit=1024)


def test_unknown_formats_and_things_that_are_no_files_are_refused() -> None:
    assert "not supported" in refusal(bytes(512), "vhdx")
    read, write = os.pipe()
    try:
        with pytest.raises(Refused, match="not a regular file"):
            check_header(read, "raw")
    finally:
        os.close(read)
        os.close(write)


@settings(max_examples=300, deadline=None)
@given(
    make=st.sampled_from([qcow2, vmdk, lambda: vmdk(kind="streamOptimized"), iso]),
    changes=st.lists(st.tuples(st.integers(0, 2048), st.binary(min_size=1, max_size=8)), max_size=6),
    declared=st.sampled_from(["raw", "qcow2", "vmdk", "iso"]),
)
def test_any_damage_is_accepted_or_refused_and_nothing_else(
    make: Callable[[], bytes], changes: list[tuple[int, bytes]], declared: str
) -> None:
    content = bytearray(make())
    for at, data in changes:
        content[at : at + len(data)] = data
    refused: Refused | None = None
    header: Header | None = None
    try:
        header = check(bytes(content), declared)
    except Refused as error:
        refused = error
    if refused is not None:
        assert refused.code == "bad-image"
        assert len(refused.message) < 300
    else:
        assert header is not None
        assert 0 < header.virtual_size <= MAX_VIRTUAL_SIZE
        assert header.format == declared


@settings(max_examples=200, deadline=None)
@given(
    field=st.sampled_from(
        ["cluster_bits", "size", "l1_entries", "l1_offset", "refcount_offset", "refcount_clusters", "length"]
    ),
    value=st.integers(0, 2**32 - 1),
)
def test_an_accepted_qcow2_has_its_tables_inside(field: str, value: int) -> None:
    content = qcow2(**{field: value})
    try:
        check(content, "qcow2")
    except Refused:
        return
    values = struct.unpack(">4sIQIIQIIQQIIQ", content[:72])
    l1_entries, l1_offset, refcounts, clusters = values[7], values[8], values[9], values[10]
    assert l1_offset + 8 * l1_entries <= len(content)
    assert refcounts + clusters * (1 << values[4]) <= len(content)
