"""A file under suspicion: opened once, read at stated places, in bounded pieces."""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from corral.errors import Refused

SECTOR = 512


class Header(NamedTuple):
    """What an accepted header says."""

    format: str
    virtual_size: int


def bad_image(message: str, hint: str = "") -> Refused:
    """The refusal of an image, to be raised."""
    return Refused(message, code="bad-image", hint=hint)


class Source:
    """Reads of an open file. Its size is taken once."""

    def __init__(self, descriptor: int) -> None:
        """Raises Refused when it is not a regular file."""
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise bad_image("this is not a regular file")
        self.descriptor, self.size = descriptor, state.st_size

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly ``length`` bytes. Raises Refused naming ``what`` when the file ends before."""
        assert 0 <= length <= 1 << 25, length
        if offset < 0 or offset + length > self.size:
            raise bad_image(f"the file is too short: its {what} would end at byte {offset + length} of {self.size}")
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise bad_image("the file changed while it was read")
        return data

    def head(self, length: int) -> bytes:
        """The first bytes, fewer when the file is shorter."""
        return os.pread(self.descriptor, length, 0)


def check_virtual_size(size: int, limit: int) -> None:
    """Raise Refused for a disk size that no guest can have here."""
    if size <= 0:
        raise bad_image("the disk has size 0")
    if size > limit:
        raise bad_image(f"the disk would have {size} bytes", hint=f"at most {limit} bytes are accepted")
    if size % SECTOR:
        raise bad_image(f"the disk's size, {size} bytes, is not a multiple of {SECTOR}")
