"""VMDK (VMware's Virtual Disk Format 1.1 / 5.0): one file that holds all. Flat and split disks name other files."""

from __future__ import annotations

import re
import struct

from corral.images.formats.source import SECTOR, Header, Source, bad_image, check_virtual_size
from corral.units import MIB

MAGIC = b"KDMV"
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_AT_END = (1 << 64) - 1
_COMPRESSED, _MARKERS = 1 << 16, 1 << 17
_FOOTER_MARKER = 3
_MAX_DESCRIPTOR = MIB
_EXTENT = re.compile(r'(?:RW|RDONLY|NOACCESS)\s+(\d{1,16})\s+(\w+)\s+"([^"]*)"(?:\s+\d+)?\s*', re.ASCII)
_NAME = re.compile(r"[^/\\\x00-\x1f]{1,255}")
_FLATTEN = "export it as one file (streamOptimized or monolithicSparse)"


def check(source: Source, limit: int) -> Header:
    """Raise Refused unless this is one whole sparse or streamOptimized file. ``limit``: largest disk, bytes."""
    raw = source.read(0, SECTOR, "header")
    if raw[:4] != MAGIC:
        if raw.startswith((b"# Disk DescriptorFile", b"COWD")):
            raise bad_image("this VMDK only describes a disk in other files", hint=_FLATTEN)
        raise bad_image("this is not a VMDK file", hint="state the format that it really has")
    (
        _, version, flags, capacity, grain, descriptor_at, descriptor_size, entries, _, directory, _, _, _, algorithm,
    ) = _HEADER.unpack_from(raw)  # fmt: skip
    if version not in (1, 2, 3):
        raise bad_image(f"VMDK version {version} is not supported")
    if capacity == 0:
        raise bad_image("the disk has size 0")
    check_virtual_size(capacity * SECTOR, limit)
    if not 1 <= grain <= 2048 or grain & (grain - 1) or entries != 512:
        raise bad_image(f"a grain of {grain} sectors and tables of {entries} entries are not possible")
    if algorithm > 1 or bool(algorithm) != bool(flags & _COMPRESSED):
        raise bad_image(f"compression algorithm {algorithm} is not supported")
    if directory == _AT_END:
        _check_footer(source, raw, flags)
    elif not 0 < directory * SECTOR < source.size:
        raise bad_image("the grain directory lies outside the file")
    if not descriptor_at or not 0 < descriptor_size * SECTOR <= _MAX_DESCRIPTOR:
        raise bad_image("this VMDK has no descriptor of its own: it is one part of a split disk", hint=_FLATTEN)
    text = source.read(descriptor_at * SECTOR, descriptor_size * SECTOR, "descriptor")
    _check_descriptor(text.split(b"\0", 1)[0].decode("utf-8", "replace"), capacity)
    return Header("vmdk", capacity * SECTOR)


def _check_footer(source: Source, header: bytes, flags: int) -> None:
    """streamOptimized: the true header stands at the end, and must say the same but for the directory's place."""
    if not flags & _MARKERS:
        raise bad_image("the grain directory is said to be at the end, without the markers that this needs")
    tail = source.read(source.size - 3 * SECTOR, 3 * SECTOR, "footer")
    _, size, kind = struct.unpack_from("<QII", tail)
    footer = tail[SECTOR : 2 * SECTOR]
    if size != 0 or kind != _FOOTER_MARKER or footer[:4] != MAGIC or any(tail[2 * SECTOR :]):
        raise bad_image("the footer is missing: the file is cut off or was changed")
    first, last = list(_HEADER.unpack_from(header)), list(_HEADER.unpack_from(footer))
    directory = last[9]
    first[9] = last[9] = 0
    first[11] = last[11] = 0  # unclean shutdown: of no meaning in a stream
    if first != last:
        raise bad_image("the footer says something else than the header")
    if not 0 < directory * SECTOR < source.size:
        raise bad_image("the grain directory lies outside the file")


def _check_descriptor(text: str, capacity: int) -> None:
    values: dict[str, str] = {}
    extents: list[re.Match[str]] = []
    for line in map(str.strip, text.splitlines()):
        key, equals, value = line.partition("=")
        if re.match(r"(?:RW|RDONLY|NOACCESS)\b", line):
            found = _EXTENT.fullmatch(line)
            if found is None:
                raise bad_image(f"the descriptor names a part that cannot be read: {line[:60]!a}", hint=_FLATTEN)
            extents.append(found)
        elif equals and not line.startswith("#"):
            values[key.strip().lower()] = value.strip().strip('"')
    kind = values.get("createtype", "")
    if kind not in ("monolithicSparse", "streamOptimized"):
        raise bad_image(f"VMDK type {kind[:40]!a} is not supported", hint=_FLATTEN)
    if values.get("parentcid", "ffffffff").lower() != "ffffffff" or "parentfilenamehint" in values:
        raise bad_image("this VMDK refers to a parent disk", hint=_FLATTEN)
    if len(extents) != 1 or extents[0][2] != "SPARSE":
        raise bad_image("this VMDK refers to other files", hint=_FLATTEN)
    if not _NAME.fullmatch(extents[0][3]):
        raise bad_image(f"the descriptor names a path: {extents[0][3][:60]!a}", hint=_FLATTEN)
    if int(extents[0][1]) != capacity:
        raise bad_image("the descriptor and the header disagree about the disk's size")
