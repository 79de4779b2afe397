"""Disk files made by hand: good ones, and every lie that a header can tell."""

from __future__ import annotations

import struct
from typing import Any

CLUSTER = 65536
GIB = 1 << 30


def qcow2(*, version: int = 3, pad: int = 4 * CLUSTER, extensions: bytes = b"", **changed: Any) -> bytes:
    """A small qcow2 whose tables lie where they should; ``changed`` overrides header fields by name."""
    fields: dict[str, Any] = {
        "magic": b"QFI\xfb", "version": version, "backing_offset": 0, "backing_size": 0, "cluster_bits": 16,
        "size": GIB, "crypt": 0, "l1_entries": 2, "l1_offset": 3 * CLUSTER, "refcount_offset": CLUSTER,
        "refcount_clusters": 1, "snapshots": 0, "snapshots_offset": 0,
        "incompatible": 0, "compatible": 0, "autoclear": 0, "refcount_order": 4, "length": 112, "compression": 0,
    }  # fmt: skip
    assert set(changed) <= set(fields), changed
    fields |= changed
    values = list(fields.values())
    head = struct.pack(">4sIQIIQIIQQIIQ", *values[:13])
    if version == 3:
        head += struct.pack(">QQQIIB7x", *values[13:]) + extensions + bytes(8)
    return head.ljust(pad, b"\0")


def extension(kind: int, data: bytes) -> bytes:
    """A qcow2 header extension."""
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="{kind}"

# Extent description
{extents}

ddb.adapterType = "lsilogic"
"""


def vmdk(
    *,
    kind: str = "monolithicSparse",
    extents: str = 'RW 2048 SPARSE "disk.vmdk"',
    descriptor: str | None = None,
    footer: dict[str, Any] | None = None,
    **changed: Any,
) -> bytes:
    """A small VMDK with an embedded descriptor. ``footer``: overrides of the footer's header; None for no footer."""
    stream = kind == "streamOptimized"
    fields: dict[str, Any] = {
        "magic": b"KDMV", "version": 3 if stream else 1, "flags": 0x30001 if stream else 3, "capacity": 2048, "grain": 128,
        "descriptor_at": 1, "descriptor_size": 20, "entries": 512, "redundant": 0,
        "directory": (1 << 64) - 1 if stream else 26, "overhead": 128, "unclean": 0, "newlines": b"\n \r\n",
        "algorithm": 1 if stream else 0,
    }  # fmt: skip
    assert set(changed) <= set(fields), changed
    fields |= changed
    text = DESCRIPTOR.format(kind=kind, extents=extents) if descriptor is None else descriptor
    body = _vmdk_header(fields) + text.encode().ljust(20 * 512, b"\0") + bytes(64 * 1024)
    if stream:
        last = fields | {"directory": 26} | (footer or {})
        body += struct.pack("<QII", 0, 0, 3).ljust(512, b"\0") + _vmdk_header(last) + bytes(512)
    return body


def _vmdk_header(fields: dict[str, Any]) -> bytes:
    return struct.pack("<4sIIQQQQIQQQB4sH", *fields.values()).ljust(512, b"\0")


def iso(*, blocks: int = 20, block: int = 2048, size: int = 20 * 2048) -> bytes:
    """A CD with nothing on it but its volume descriptor."""
    volume = bytearray(b"\x01CD001\x01".ljust(2048, b"\0"))
    volume[80:84], volume[128:130] = blocks.to_bytes(4, "little"), block.to_bytes(2, "little")
    return (bytes(16 * 2048) + bytes(volume)).ljust(size, b"\0")
