"""From a file that somebody gave us to a disk of our own: checked header, then a bounded conversion to qcow2."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, cast

from corral.errors import CorralError, Refused, Unavailable
from corral.images.files import Progress
from corral.images.header import Header, check_header
from corral.units import GIB, MIB, format_size

MAX_RATIO = 64
"""Largest growth that a conversion may show: well above any compression of real disks, far below a bomb."""
FLOOR = GIB
"""Bytes that any image may take, whatever its ratio: an empty file system shrinks to nearly nothing."""
_RESERVE = GIB
"""Disk space that a conversion leaves free."""

Readable: TypeAlias = Literal["raw", "qcow2", "vmdk"]


class Converter(Protocol):
    """Makes our own qcow2 of an accepted disk file (:class:`corral.storage.qemu_img.QemuImg`)."""

    async def convert(
        self,
        source: Path,
        source_format: Readable,
        target: Path,
        *,
        max_bytes: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None: ...


async def take_disk(
    source: Path, declared: str, directory: Path, converter: Converter, *, limit: int, progress: Progress
) -> Header:
    """Make ``disk.qcow2`` (or ``disk.iso``) in ``directory`` of a file that only we can write.

    The file is opened once for the check, and must be the same when the conversion has ended.
    Raises Refused ``bad-image``.
    """
    with opened(source) as descriptor:
        before = os.fstat(descriptor)
        progress("checking the header", 0, 0)
        header = check_header(descriptor, declared, limit)
        progress("converting the disk", 0, before.st_size)
        if header.format == "iso":
            await asyncio.to_thread(shutil.copyfile, source, directory / "disk.iso")
        else:
            await _convert(source, header, before.st_size, directory / "disk.qcow2", converter)
        progress("converting the disk", before.st_size, before.st_size)
        with opened(source) as again:
            after = os.fstat(again)
        if _identity(before) != _identity(after):
            raise Refused("the file changed while it was read", code="bad-image")
    return header


def copy_private(source: Path, target: Path) -> None:
    """Copy a file that others could change meanwhile; what is checked afterwards is the copy. Blocking."""
    with opened(source) as descriptor:
        if not Path(f"/proc/self/fd/{descriptor}").is_file():
            raise Refused("this is not a regular file", code="bad-image")
        with os.fdopen(os.dup(descriptor), "rb") as read, target.open("xb") as out:
            shutil.copyfileobj(read, out, MIB)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a file, never through a link and without waiting for a FIFO's other end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"the file cannot be opened: {error.strerror}", code="bad-image") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def _convert(source: Path, header: Header, size: int, target: Path, converter: Converter) -> None:
    free = shutil.disk_usage(target.parent).free
    whole = header.virtual_size + header.virtual_size // 64 + 16 * MIB
    budget = min(whole, size * MAX_RATIO + FLOOR, free - _RESERVE)
    if budget <= 0:
        raise Unavailable(f"only {format_size(free)} of disk space are left")
    try:
        await converter.convert(source, cast(Readable, header.format), target, max_bytes=budget)
    except CorralError as error:
        if error.code != "failed":
            raise
        raise Refused(f"the disk cannot be read: {error.message}", code="bad-image") from error


def _identity(state: os.stat_result) -> tuple[int, int, int, int]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
