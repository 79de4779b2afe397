"""The look that we take at an image ourselves, before any program of QEMU's opens it.

qemu-img reads formats that name other files (backing files, extents, data files): a header made by a stranger must not
make it open them. Only four formats pass, each checked against what it declares to be; the verdict is format and size.
"""

from __future__ import annotations

from collections.abc import Callable

from corral.images.formats import plain, qcow2, vmdk
from corral.images.formats.source import Header, Source, bad_image
from corral.units import GIB

MAX_VIRTUAL_SIZE = 2048 * GIB
"""Largest disk that is taken: what a 512-byte-sector partition table can describe."""

_CHECKS: dict[str, Callable[[Source, int], Header]] = {
    "qcow2": qcow2.check,
    "vmdk": vmdk.check,
    "raw": plain.check_raw,
    "iso": plain.check_iso,
}

__all__ = ["MAX_VIRTUAL_SIZE", "Header", "check_header"]


def check_header(descriptor: int, declared: str, limit: int = MAX_VIRTUAL_SIZE) -> Header:
    """What the open file is, as declared. Raises Refused ``bad-image`` for anything that is not plainly good.

    Args:
        descriptor: opened by the caller, who makes sure that the file stays the same until it is converted.
        declared: ``raw``, ``qcow2``, ``vmdk`` or ``iso``.
        limit: largest virtual size, bytes.
    """
    check = _CHECKS.get(declared)
    if check is None:
        raise bad_image(f"format {declared[:20]!a} is not supported", hint=f"one of {', '.join(_CHECKS)}")
    source = Source(descriptor)
    if source.size == 0:
        raise bad_image("the file is empty")
    plain.check_disguise(source, declared)
    return check(source, limit)
