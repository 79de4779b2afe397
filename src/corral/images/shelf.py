"""A directory of finished image directories. Things get onto it by one rename, so a kill leaves a whole image or none.

Used twice: for the images of a state directory (named by digest), for the cache of builds (named by recipe digest).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import msgspec

from corral.errors import NotFound
from corral.images.files import MANIFEST, PARTS, Manifest, Part
from corral.runtime.random import Random

_STAGING = ".staging-"
_FICLONE = 0x40049409
"""ioctl that makes a file share another's blocks (btrfs, xfs, bcachefs)."""


class Shelf:
    """Finished directories under ``root``. Blocking: call in a thread what touches large files."""

    def __init__(self, root: Path, random: Random) -> None:
        self.root, self._random = root, random

    def names(self) -> list[str]:
        """What stands here, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(
            path.parent.name for path in self.root.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")
        )

    def read(self, name: str) -> Manifest:
        """The manifest of an image. Raises NotFound, also for one whose files are not all there."""
        directory = self.root / name
        try:
            manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError) as error:
            raise NotFound(f"there is no image {name[:16]} on this host") from error
        for part, record in manifest.parts.items():
            path = directory / part
            if not path.is_file() or path.stat().st_size != record.size:
                raise NotFound(f"image {name[:16]} on this host lost its file {part}")
        return manifest

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory on the same file system; it goes when the block ends, unless :meth:`put` took it."""
        self.root.mkdir(mode=0o711, parents=True, exist_ok=True)
        path = self.root / f"{_STAGING}{self._random.token(8).hex()}"
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def put(self, staging: Path, name: str) -> None:
        """Have the sealed directory ``staging`` stand here as ``name``. One that stands there already stays."""
        target = self.root / name
        staging.chmod(0o711)
        try:
            staging.rename(target)
        except OSError:
            if not (target / MANIFEST).is_file():
                raise
        _sync(self.root)

    def copy(self, source: Path, name: str) -> None:
        """Put a copy of a finished directory here, sharing its blocks where the file system allows."""
        with self.staging() as staging:
            for entry in source.iterdir():
                _share(entry, staging / entry.name)
            self.put(staging, name)

    def remove(self, name: str) -> None:
        """Take an image away; a no-op when it is not here. Running VMs keep their open files."""
        gone = self.root / f"{_STAGING}{self._random.token(8).hex()}"
        try:
            (self.root / name).rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone)

    def sweep(self) -> None:
        """Remove what killed processes left. Only for a directory that no other process uses."""
        for path in self.root.glob(f"{_STAGING}*"):
            shutil.rmtree(path, ignore_errors=True)


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Finish a staged image: measure its files, make them read-only and durable, write and return the manifest."""
    parts = {name: _measure(directory / name) for name in PARTS if (directory / name).exists()}
    whole = msgspec.structs.replace(manifest, parts=parts)
    (directory / MANIFEST).write_bytes(msgspec.json.encode(whole, order="sorted"))
    for name in (*parts, MANIFEST):
        (directory / name).chmod(0o444)
        _sync(directory / name)
    _sync(directory)
    return whole


def _measure(path: Path) -> Part:
    with path.open("rb") as file:
        return Part(size=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _share(source: Path, target: Path) -> None:
    """Hard link; else a clone of the blocks; else a copy. The files are read-only for ever, so sharing is safe."""
    try:
        target.hardlink_to(source)
        return
    except OSError:
        pass  # another file system, another owner
    with source.open("rb") as src, target.open("xb") as dst:
        try:
            ioctl(dst.fileno(), _FICLONE, src.fileno())
        except OSError:
            shutil.copyfileobj(src, dst, 1 << 20)
    target.chmod(0o444)
    _sync(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
