"""Unpacking a tar stream that a guest made. The guest is not trusted: nothing may land, or point, outside the target.

Refused, one by one and by name: absolute names, ``..``, links that lead out, devices, sockets, FIFOs, and anything
below a link. Set-id bits and owners are dropped. Headers are bounded: a stream may declare them as large as it likes.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, cast

from corral.errors import CorralError

MAX_HEADER = 1 << 20
"""Bytes of one extended header (names, attributes): tarfile reads them whole into memory."""
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
CHUNK = 1 << 16


class BoundedInfo(tarfile.TarInfo):
    """A header that may not be larger than :data:`MAX_HEADER`."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type in _EXTENDED and not 0 <= self.size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        if self.size < 0:
            raise tarfile.ReadError("a negative size")
        return super()._proc_member(archive)  # type: ignore[misc]


class Readable(Protocol):
    """Where the stream comes from."""

    def read(self, size: int = -1, /) -> bytes: ...


class Refusal(Exception):
    """One entry that is not taken; the text says why."""


def unpack(
    stream: Readable, target: Path, *, refused: Callable[[str, str], None], progress: Callable[[int], None]
) -> int:
    """Unpack a stream whose entries all begin with one name, which becomes ``target``. Returns how many were taken.

    ``refused(name, why)`` is told of every entry that is not; ``progress(bytes)`` of bytes written. Raises CorralError
    when the stream cannot be read, OSError when a file cannot be written.
    """
    taken = 0
    modes: list[tuple[Path, int]] = []
    try:
        with _open(stream) as archive:
            for entry in archive:
                try:
                    _place(archive, entry, target, modes, progress)
                    taken += 1
                except Refusal as why:
                    refused(entry.name, str(why))
                archive.members.clear()  # type: ignore[attr-defined] # a stream with endless entries must not fill memory
    except (tarfile.TarError, EOFError) as error:
        raise CorralError(f"what the guest sent is not a tar stream: {error}", code="guest") from error
    for path, mode in reversed(modes):
        path.chmod(mode)
    return taken


def take_file(stream: Readable, target: Path, *, progress: Callable[[int], None]) -> None:
    """Write the one regular file of a stream to ``target``, a path that the user chose (links in it are the user's).

    Raises CorralError when the stream holds anything else.
    """
    try:
        with _open(stream) as archive:
            entry = archive.next()
            source = archive.extractfile(entry) if entry is not None and entry.isreg() else None
            if entry is None or source is None:
                raise CorralError("the guest sent something else than a file", code="guest")
            new = not target.exists()
            with target.open("wb") as file:
                copy_bytes(source, file, progress)
                if new:
                    os.fchmod(file.fileno(), entry.mode & 0o777)
    except (tarfile.TarError, EOFError) as error:
        raise CorralError(f"what the guest sent is not a tar stream: {error}", code="guest") from error


def _open(stream: Readable) -> tarfile.TarFile:
    source = cast(IO[bytes], stream)  # of a stream only read() is used
    return tarfile.open(fileobj=source, mode="r|", tarinfo=BoundedInfo, bufsize=1 << 18)


def inside(name: str) -> str:
    """The path below the first component, normalised (empty for the top itself). Raises Refusal."""
    if not name or name.startswith("/") or "\0" in name:
        raise Refusal("the name is absolute or empty")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refusal("the name contains ..")
    return "/".join(parts[1:])


def _place(
    archive: tarfile.TarFile,
    entry: tarfile.TarInfo,
    target: Path,
    modes: list[tuple[Path, int]],
    progress: Callable[[int], None],
) -> None:
    relative = inside(entry.name)
    path = target / relative if relative else target
    _refuse_links_above(target, relative)
    if entry.isdir():
        if relative and path.is_symlink():
            raise Refusal("a link stands where a directory belongs")
        path.mkdir(mode=0o700, exist_ok=True, parents=bool(relative))
        modes.append((path, entry.mode & 0o777 | stat.S_IRWXU))
    elif entry.isreg():
        _clear(path)
        _write(archive, entry, path, progress)
    elif entry.issym():
        if leads_out(relative, entry.linkname):
            raise Refusal(f"the link leads out of the tree, to {entry.linkname!r}")
        _clear(path)
        path.symlink_to(entry.linkname)
    elif entry.islnk():
        first = inside(entry.linkname)
        _refuse_links_above(target, first)
        original = target / first
        if not stat.S_ISREG(os.lstat(original).st_mode):
            raise Refusal("a hard link to something that is no file")
        if original != path:
            _clear(path)
            os.link(original, path, follow_symlinks=False)
    else:
        raise Refusal("it is a device, a FIFO or a socket")


def leads_out(relative: str, link: str) -> bool:
    """Whether a link at ``relative`` (below the target) to ``link`` points outside the target."""
    if link.startswith("/") or "\0" in link or not relative:
        return True
    end = posixpath.normpath(posixpath.join(posixpath.dirname(relative), link))
    return end == ".." or end.startswith("../")


def _refuse_links_above(target: Path, relative: str) -> None:
    """Nothing is written through a link below the target, wherever it leads: what it leads to is the guest's choice."""
    path = target
    for part in posixpath.dirname(relative).split("/"):
        if part:
            path = path / part
            if path.is_symlink():
                raise Refusal("it lies below a link")


def _clear(path: Path) -> None:
    """Make room: what stands there goes, unless it is a directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise Refusal("a directory stands in its place")
    path.unlink()


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path, progress: Callable[[int], None]) -> None:
    source = archive.extractfile(entry)
    assert source is not None, "a regular member has content"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, entry.mode & 0o777 | stat.S_IWUSR), "wb") as file:
        copy_bytes(source, file, progress)
        os.fchmod(file.fileno(), entry.mode & 0o777)


def copy_bytes(source: IO[bytes], file: IO[bytes], progress: Callable[[int], None]) -> None:
    """All of ``source`` into ``file``, telling ``progress`` of each piece."""
    while data := source.read(CHUNK):
        file.write(data)
        progress(len(data))
