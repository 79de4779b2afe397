"""A log that never grows beyond its bound: two files, the newer one appended to, the older one dropped in turn.

``serial.log`` and ``serial.log.1``, each half of the bound. Plain text, so that ``tail`` and ``less`` read it; it
survives the daemon, and is written without fsync: a console is not a ledger.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from corral.units import MIB

log = structlog.get_logger("console")

BOUND = MIB


class LogRing:
    """The last ``bound`` bytes (at least half of them) written to ``path``."""

    def __init__(self, path: Path, bound: int = BOUND) -> None:
        self._path, self._older, self._half = path, path.with_name(path.name + ".1"), bound // 2
        self._file: int | None = None
        self._size = 0
        self._broken = False

    def write(self, data: bytes) -> None:
        """Append. A disk that takes no more loses log, not VMs: told once, tried again with the next bytes."""
        try:
            for start in range(0, len(data), self._half):
                self._append(data[start : start + self._half])
            self._broken = False
        except OSError as error:
            if not self._broken:
                log.warning("a serial log cannot be written", path=str(self._path), error=str(error))
            self._broken = True

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._file).st_size
        if self._size + len(data) > self._half:
            os.close(self._file)
            self._file = None
            self._path.replace(self._older)
            self._append(data)
            return
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self._size += len(data)

    def tail(self, count: int) -> bytes:
        """The last ``count`` bytes there are."""
        found = b""
        for path in (self._path, self._older):
            if len(found) < count:
                found = _tail(path, count - len(found)) + found
        return found

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _tail(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - count))
            return file.read(count)
    except FileNotFoundError:
        return b""
