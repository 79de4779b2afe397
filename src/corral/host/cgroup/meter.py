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
        self._files: dict[Path, int] = {}
        self._usage, self._throttled = usage, throttled
        self._last: dict[Field, float] = {}

    def usage(self) -> float:
        return self._read(self._usage)

    def throttled(self) -> float:
        return self._read(self._throttled)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _read(self, field: Field) -> float:
        try:
            if field.path not in self._files:
                self._files[field.path] = os.open(field.path, os.O_RDONLY | os.O_CLOEXEC)
            text = os.pread(self._files[field.path], 1024, 0)
        except OSError:  # it is not there (yet), or has just been removed
            return self._last.get(field, 0.0)
        if field.name:
            words = text.split()
            name = field.name.encode()
            value = int(words[words.index(name) + 1]) if name in words else 0
        else:
            value = int(text)
        self._last[field] = value * field.unit
        return self._last[field]
