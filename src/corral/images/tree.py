"""A file tree in memory, owned by root whoever builds it, and its two archive forms: cpio (initrd) and tar.

Written by us because the ``cpio`` program needs the files on disk with the right owner, that is: root.
"""

from __future__ import annotations

import io
import stat
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple


class Entry(NamedTuple):
    """One file: ``mode`` with its type bits, content (or a symlink's target), device numbers of a node."""

    mode: int
    data: bytes = b""
    major: int = 0
    minor: int = 0


class Tree:
    """Paths (as in the guest) to entries; parents are made as needed. Archives are sorted: same tree, same bytes."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Have a directory; an existing one keeps its mode."""
        self._put(path, Entry(stat.S_IFDIR | mode), keep=True)

    def file(self, path: str, content: bytes | str | Path, mode: int = 0o644) -> None:
        """Have a regular file with this content, or with that of a file of this machine."""
        data = content.read_bytes() if isinstance(content, Path) else content
        self._put(path, Entry(stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data))

    def link(self, path: str, target: str) -> None:
        """Have a symbolic link."""
        self._put(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Have a character device."""
        self._put(path, Entry(stat.S_IFCHR | mode, major=major, minor=minor))

    def __contains__(self, path: str) -> bool:
        return path.strip("/") in self._entries

    def _put(self, path: str, entry: Entry, *, keep: bool = False) -> None:
        name = path.strip("/")
        assert name, path
        assert ".." not in PurePosixPath(name).parts, path
        for parent in reversed(PurePosixPath(name).parents[:-1] if "/" in name else ()):
            self._entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
        if not (keep and name in self._entries):
            self._entries[name] = entry

    def write_cpio(self, out: BinaryIO) -> None:
        """Write the ``newc`` archive that Linux unpacks as its first root (its docs: early-userspace/buffer-format)."""
        for number, name in enumerate(sorted(self._entries), start=1):
            _write_newc(out, number, name, self._entries[name])
        _write_newc(out, 0, "TRAILER!!!", Entry(0))

    def write_tar(self, out: BinaryIO) -> None:
        """Write a tar archive of the same tree, owned by root, without times."""
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in sorted(self._entries):
                entry = self._entries[name]
                info = tarfile.TarInfo(name)
                info.mode, info.mtime = stat.S_IMODE(entry.mode), _EPOCH
                if stat.S_ISDIR(entry.mode):
                    info.type = tarfile.DIRTYPE
                elif stat.S_ISLNK(entry.mode):
                    info.type, info.linkname = tarfile.SYMTYPE, entry.data.decode()
                elif stat.S_ISCHR(entry.mode):
                    info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, entry.major, entry.minor
                else:
                    info.size = len(entry.data)
                archive.addfile(info, io.BytesIO(entry.data) if info.isreg() else None)


_EPOCH = 1_700_000_000
"""One fixed modification time, so that the same input gives the same archive."""


def _write_newc(out: BinaryIO, inode: int, name: str, entry: Entry) -> None:
    raw = name.encode() + b"\0"
    numbers = (
        inode, entry.mode, 0, 0, 1, _EPOCH, len(entry.data), 0, 0, entry.major, entry.minor, len(raw), 0,
    )  # fmt: skip
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + raw
    out.write(head + bytes(-len(head) % 4))
    out.write(entry.data + bytes(-len(entry.data) % 4))
