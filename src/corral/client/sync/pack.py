"""Packing files of this machine as a tar stream for a guest: regular files, directories and links; nothing else."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol, cast

from corral.errors import CorralError, Invalid, Problem


class Writable(Protocol):
    """Where the stream goes."""

    def write(self, data: bytes, /) -> object: ...


class CountingFile:
    """A file that tells how much of it was read (tarfile reads through it)."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        self._file, self._progress = file, progress

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(len(data))
        return data


def check_source(path: Path, *, recursive: bool) -> None:
    """Raises Invalid for what cannot be copied: not there, a directory without ``-r``, a device, a FIFO."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise Invalid([Problem(str(path), (error.strerror or "cannot be read").lower())]) from error
    if stat.S_ISDIR(mode) and not recursive:
        raise Invalid([Problem(str(path), "it is a directory")], hint="copy directories with -r")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise Invalid([Problem(str(path), "it is neither a file nor a directory")])


def pack(
    source: Path, name: str, stream: Writable, *, skipped: Callable[[str, str], None], progress: Callable[[int], None]
) -> None:
    """Write ``source`` to ``stream`` under the name ``name``, owned by root there (GNU format: busybox reads it too).

    ``skipped(path, why)`` is told of devices, sockets, FIFOs and unreadable files below a directory. Raises CorralError
    when a file changes its size while it is read.
    """
    target = cast(IO[bytes], stream)  # of a stream only write() is used
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 18) as archive:
        for path, inner in _walk(source, name):
            try:
                info = _describe(path, inner, top=path == source)
                file = path.open("rb") if info is not None and info.isreg() else None
            except OSError as error:
                if path == source:
                    raise
                skipped(str(path), error.strerror or "cannot be read")
                continue
            if info is None:
                skipped(str(path), "it is a device, a FIFO or a socket")
                continue
            _add(archive, info, file, path, progress)


def _add(
    archive: tarfile.TarFile, info: tarfile.TarInfo, file: IO[bytes] | None, path: Path, progress: Callable[[int], None]
) -> None:
    if file is None:
        archive.addfile(info)
    else:
        with file:
            info.size = os.fstat(file.fileno()).st_size
            try:
                archive.addfile(info, cast(IO[bytes], CountingFile(file, progress)))  # only its read() is used
            except OSError as error:
                if "unexpected end of data" in str(error):
                    raise CorralError(f"{path} became shorter while it was read") from error
                raise
    archive.members.clear()  # type: ignore[attr-defined]  # a tree of millions must not fill memory


def _walk(source: Path, name: str) -> Iterator[tuple[Path, str]]:
    """``source`` and everything below it, parents first, sorted; with the name of each in the stream."""
    yield source, name
    if source.is_dir():
        for entry in sorted(os.scandir(source), key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), f"{name}/{entry.name}")
            else:
                yield Path(entry.path), f"{name}/{entry.name}"


def _describe(path: Path, inner: str, *, top: bool) -> tarfile.TarInfo | None:
    """The header of one entry; None for what is never copied. A link given by the user himself is followed."""
    found = path.stat() if top else path.lstat()
    info = tarfile.TarInfo(inner)
    info.mode, info.mtime = stat.S_IMODE(found.st_mode) & 0o777, int(found.st_mtime)
    info.uname = info.gname = "root"
    if stat.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(found.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)  # noqa: PTH115 - a Path would lose a trailing slash
    elif stat.S_ISREG(found.st_mode):
        info.size = found.st_size
    else:
        return None
    return info
