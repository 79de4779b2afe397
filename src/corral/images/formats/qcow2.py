"""qcow2 (QEMU's docs/interop/qcow2.txt): no other file, no unknown feature, no table outside or out of proportion."""

from __future__ import annotations

import struct

from corral.images.formats.source import Header, Source, bad_image, check_virtual_size
from corral.units import KIB, MIB

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")

_CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_KNOWN_BITS = 1 | _COMPRESSION | _EXTENDED_L2
"""Bit 0 (not closed cleanly) is harmless for reading."""
_EXTENSIONS_REFUSED = {
    0xE2792ACA: "names a backing file's format",
    0x44415441: "names an external data file",
    0x0537BE77: "is encrypted",
}
_MAX_L1, _MAX_REFCOUNT_TABLE = 32 * MIB, 8 * MIB
"""QEMU's own limits, in bytes."""


def check(source: Source, limit: int) -> Header:
    """Raise Refused unless this header is harmless. ``limit``: largest virtual size, bytes."""
    (
        magic, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_entries, l1_offset,
        refcount_offset, refcount_clusters, snapshots, _,
    ) = _V2.unpack(source.read(0, _V2.size, "header"))  # fmt: skip
    if magic != MAGIC:
        raise bad_image("this is not a qcow2 file", hint="state the format that it really has")
    if version not in (2, 3):
        raise bad_image(f"qcow2 version {version} is not supported", hint="convert it with qemu-img convert -O qcow2")
    if backing_offset or backing_size:
        raise bad_image("the image refers to a backing file", hint="flatten it: qemu-img convert -O qcow2")
    if crypt:
        raise bad_image("the image is encrypted")
    if not 9 <= cluster_bits <= 21:
        raise bad_image(f"2^{cluster_bits} bytes is not a possible cluster size")
    if snapshots:
        raise bad_image(f"the image holds {snapshots} internal snapshots", hint="flatten it: qemu-img convert -O qcow2")
    check_virtual_size(size, limit)
    cluster = 1 << cluster_bits
    extended = version == 3 and _check_v3(source, cluster)
    entries = cluster // (16 if extended else 8)
    if l1_entries < -(-size // (cluster * entries)):
        raise bad_image("the image's L1 table is too small for its size")
    _check_table(source, "L1 table", l1_offset, l1_entries * 8, _MAX_L1, cluster)
    _check_table(source, "refcount table", refcount_offset, refcount_clusters * cluster, _MAX_REFCOUNT_TABLE, cluster)
    return Header("qcow2", size)


def _check_v3(source: Source, cluster: int) -> bool:
    """The fields of version 3 and the header extensions. True when L2 entries are of the extended kind."""
    incompatible, _, _, refcount_order, length = _V3.unpack(source.read(_V2.size, _V3.size, "header"))
    if incompatible & _DATA_FILE:
        raise bad_image("the image keeps its data in another file", hint="flatten it: qemu-img convert -O qcow2")
    if incompatible & _CORRUPT:
        raise bad_image("the image is marked as corrupt", hint="repair it: qemu-img check -r all")
    if incompatible & ~_KNOWN_BITS:
        raise bad_image(f"the image uses unknown features ({incompatible & ~_KNOWN_BITS:#x})")
    if refcount_order > 6:
        raise bad_image(f"2^{refcount_order} bits is not a possible reference count")
    if not 104 <= length <= min(cluster, 4 * KIB) or length % 8:
        raise bad_image(f"the header cannot be {length} bytes long")
    compression = source.read(104, 1, "header")[0] if length > 104 else 0
    if compression > 1 or bool(compression) != bool(incompatible & _COMPRESSION):
        raise bad_image(f"compression type {compression} is not supported")
    extended = bool(incompatible & _EXTENDED_L2)
    if extended and cluster < 16 * KIB:
        raise bad_image("extended L2 entries need clusters of at least 16 KiB")
    _check_extensions(source, length, cluster)
    return extended


def _check_extensions(source: Source, offset: int, cluster: int) -> None:
    while True:
        kind, length = struct.unpack(">II", source.read(offset, 8, "header extensions"))
        if kind == 0:
            return
        if kind in _EXTENSIONS_REFUSED:
            raise bad_image(f"the image {_EXTENSIONS_REFUSED[kind]}", hint="flatten it: qemu-img convert -O qcow2")
        offset += 8 + -(-length // 8) * 8
        if offset + 8 > cluster:
            raise bad_image("the header extensions do not end within the first cluster")


def _check_table(source: Source, what: str, offset: int, length: int, limit: int, cluster: int) -> None:
    if not 0 < length <= limit:
        raise bad_image(f"the image's {what} cannot have {length} bytes")
    if offset % cluster or offset < cluster or offset + length > source.size:
        raise bad_image(f"the image's {what} lies outside the file, or not on a cluster")
