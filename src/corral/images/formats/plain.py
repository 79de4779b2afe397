"""Formats without a header of their own: raw disks and CDs. What they must not be is everything else."""

from __future__ import annotations

from corral.images.formats import qcow2, vmdk
from corral.images.formats.source import SECTOR, Header, Source, bad_image, check_virtual_size

_CD_SECTOR, _CD_VOLUME = 2048, 16 * 2048
_DISKS: tuple[tuple[int, bytes, str], ...] = (
    (0, qcow2.MAGIC, "qcow2"),
    (0, vmdk.MAGIC, "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"QED\0", "QED"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VHD"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"SKUL\xba\xbe", "LUKS"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (0, b"koly", "DMG"),
)
_PACKED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"7z\xbc\xaf\x27\x1c", "7-zip"),
    (257, b"ustar", "tar"),
)


def check_disguise(source: Source, declared: str) -> None:
    """Raise Refused when the file begins like another format than the declared one."""
    head = source.head(SECTOR)
    for offset, magic, name in _PACKED:
        if head[offset:].startswith(magic):
            raise bad_image(f"this file is packed ({name})", hint="unpack it first: nothing is unpacked on arrival")
    for offset, magic, name in _DISKS:
        if head[offset:].startswith(magic) and name.lower() != declared:
            hint = (
                f"state the format as {name.lower()}"
                if name in ("qcow2", "VMDK")
                else "convert it: qemu-img convert -O qcow2"
            )
            raise bad_image(f"this was declared as {declared} and begins like {name}", hint=hint)
    if declared in ("qcow2", "vmdk") and _cd_volume(source):
        raise bad_image(f"this was declared as {declared} and is a CD as well")


def check_raw(source: Source, limit: int) -> Header:
    """A raw disk: its size is the file's."""
    check_virtual_size(source.size, limit)
    return Header("raw", source.size)


def check_iso(source: Source, limit: int) -> Header:
    """A CD: its primary volume descriptor must be there, and the file as long as it says."""
    volume = _cd_volume(source)
    if not volume:
        raise bad_image("this is not a CD image (ISO 9660)", hint="state the format that it really has")
    blocks, block = int.from_bytes(volume[80:84], "little"), int.from_bytes(volume[128:130], "little")
    if block != _CD_SECTOR or blocks == 0 or blocks * block > source.size:
        raise bad_image(f"the CD should have {blocks} blocks of {block} bytes and the file has {source.size} bytes")
    if source.size > limit:
        raise bad_image(f"the CD has {source.size} bytes", hint=f"at most {limit} bytes are accepted")
    return Header("iso", source.size)


def _cd_volume(source: Source) -> bytes:
    """The primary volume descriptor, or nothing."""
    if source.size < _CD_VOLUME + _CD_SECTOR:
        return b""
    volume = source.read(_CD_VOLUME, _CD_SECTOR, "volume descriptor")
    return volume if volume.startswith(b"\x01CD001\x01") else b""
