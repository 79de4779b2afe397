"""Reading and writing the kernel's small files, with errors that say what was tried."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from corral.errors import CorralError, Refused


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise _refused(path, text, error) from error


class Knob:
    """A small file that is written again and again, and stays open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def write(self, text: str) -> None:
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            os.pwrite(self._fd, text.encode(), 0)
        except OSError as error:
            raise _refused(self.path, text, error) from error

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _refused(path: Path, text: str, error: OSError) -> CorralError:
    return CorralError(f"{path}: {text} was not taken: {error.strerror}", code="engine")


def number(path: Path) -> int:
    """The number that a file holds; 0 when the group is not there."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def field(path: Path, name: str) -> int:
    """A line ``name NUMBER`` of a file; 0 without one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == name), 0)


def make(path: Path) -> Path:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise CorralError(f"the control group {path} cannot be made: {error.strerror}", code="engine") from error
    return path


def remove(path: Path) -> None:
    """Raises Refused ``in-use`` while a process is in it."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise CorralError(f"the control group {path} cannot be removed: {error.strerror}", code="engine") from error
        raise Refused(f"the control group {path} still has a process", code="in-use") from error


def remove_empty(parent: Path) -> None:
    """A parent without children; one that has some stays."""
    if parent.is_dir() and not children(parent):
        remove(parent)


def children(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
