"""Unix sockets in deep directories. The kernel takes 107 bytes of path; a state directory may be longer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_PATH = 107


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits the kernel's limit while the block runs (bind or connect inside it)."""
    if len(os.fsencode(path)) <= MAX_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
