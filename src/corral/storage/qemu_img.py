"""The one place that runs qemu-img. The format is always stated, never probed: a guest can write any header itself.

Every call has a deadline, resource limits and bounded output; answers are JSON. Paths are absolute, so qemu-img cannot
read a protocol (``nbd:``, ``json:``) out of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from corral.errors import CorralError
from corral.runtime.program import Finished, Limits, run_program
from corral.units import GIB, MIB

DiskFormat: TypeAlias = Literal["raw", "qcow2", "vmdk"]

QUICK_S = 30.0
"""Deadline of calls that touch only metadata."""
CONVERT_S = 1800.0
_MEMORY = 2 * GIB
"""Address space of qemu-img: images with absurd tables fail here instead of taking the host's memory."""

_QUICK = Limits(cpu_s=int(QUICK_S), memory=_MEMORY)


class DiskInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """What qemu-img says of a disk file."""

    virtual_size: int
    format: str
    actual_size: int = 0
    full_backing_filename: str = ""
    backing_filename_format: str = ""


class QemuImg:
    """qemu-img with stated formats."""

    async def create(self, target: Path, size: int) -> None:
        """Make an empty qcow2 disk of ``size`` bytes."""
        await self._call("create", ["-q", "-f", "qcow2", _file(target), str(size)], what="making a disk")

    async def create_overlay(self, target: Path, base: Path, base_format: DiskFormat, size: int | None) -> None:
        """Make a qcow2 disk that starts as ``base`` and keeps only what differs. ``size``: None for the base's own."""
        grown = [] if size is None else [str(size)]
        argv = ["-q", "-f", "qcow2", "-F", base_format, "-b", _file(base), _file(target), *grown]
        await self._call("create", argv, what="making a disk over the image")

    async def grow(self, path: Path, format: DiskFormat, size: int) -> None:
        """Make a disk larger. Shrinking is refused by qemu-img."""
        await self._call("resize", ["-q", "-f", format, _file(path), str(size)], what="growing a disk")

    async def info(self, path: Path, format: DiskFormat) -> DiskInfo:
        """Sizes and backing file, also while a VM uses the disk."""
        done = await self._call("info", ["-U", "-f", format, "--output=json", _file(path)], what="looking at a disk")
        try:
            return msgspec.json.decode(done.stdout, type=DiskInfo)
        except msgspec.DecodeError as error:
            raise CorralError(f"qemu-img gave an answer that cannot be read: {error}") from error

    async def convert(
        self,
        source: Path,
        source_format: DiskFormat,
        target: Path,
        *,
        max_bytes: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Copy a disk of any accepted format into a new qcow2 file, of at most ``max_bytes`` on the host's disk.

        ``source`` may be hostile (:mod:`corral.images` checks its header before): time, memory, output are bounded.
        """
        argv = ["-q", "-f", source_format, "-O", "qcow2", "-W", _file(source), _file(target)]
        limits = Limits(cpu_s=int(CONVERT_S), memory=_MEMORY, file_size=max_bytes)
        await self._call("convert", argv, what="converting the disk", timeout_s=CONVERT_S, limits=limits)
        if progress is not None:
            progress(1, 1)

    async def _call(
        self,
        verb: str,
        arguments: Sequence[str],
        *,
        what: str,
        timeout_s: float = QUICK_S,
        limits: Limits = _QUICK,
    ) -> Finished:
        return await run_program(
            ["qemu-img", verb, *arguments], what=what, timeout_s=timeout_s, limits=limits, max_output=MIB
        )


def _file(path: Path) -> str:
    """A path as qemu-img takes it, certainly a file of this machine."""
    assert path.is_absolute(), f"qemu-img needs an absolute path, not {path}"
    return str(path)
