"""CPU time of one group, read again and again: its files stay open, which makes a reading five times as fast."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Field(NamedTuple):
    """Where a number is: alone in a file, or behind ``name``. ``unit``: seconds of one."""

    path: Path
    name: str
    unit: float


class Meter:
    """``usage`` and ``throttled`` of a group, seconds. One that has gone keeps its last figures."""

    def __init__(self, usage: Field, throttled: Field) -> None:
        self._usage, self._throttled = _Reading(usage), _Reading(throttled)

    def usage(self) -> float:
        return self._usage.read()

    def throttled(self) -> float:
        return self._throttled.read()

    def close(self) -> None:
        self._usage.close()
        self._throttled.close()


class _Reading:
    def __init__(self, field: Field) -> None:
        self._path, self._name, self._unit = field.path, field.name.encode(), field.unit
        self._fd: int | None = None
        self._last = 0.0

    def read(self) -> float:
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            text = os.pread(self._fd, 1024, 0)
        except OSError:  # it is not there (yet), or has just been removed
            return self._last
        if self._name:
            words = text.split()
            value = int(words[words.index(self._name) + 1]) if self._name in words else 0
        else:
            value = int(text)
        self._last = value * self._unit
        return self._last

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
