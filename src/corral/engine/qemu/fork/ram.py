"""A template's memory: a file without a name (memfd) that is sealed once it is complete.

The seal is what makes it impossible to damage: the kernel then refuses every write to it and every hole in it, by
whomever. Private mappings still work, which is all a fork needs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator

_NOEXEC_SEAL = 0x8
"""Linux 6.3: not executable, ever. It asks for it, and earlier kernels do not know it."""
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def make(size: int) -> int:
    """An empty memory of ``size`` bytes."""
    try:
        fd = os.memfd_create("corral-template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("corral-template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def seal(fd: int) -> None:
    """Nobody changes it any more. No writable mapping of it may be left. May be repeated."""
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def copy(source: int, target: int) -> None:
    """Copy what ``source`` holds to the same places in ``target``, a file as long that is empty; holes stay holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    with mmap.mmap(source, size, prot=mmap.PROT_READ) as view, memoryview(view) as whole:
        for start, end in extents(source):
            while start < end:
                start += os.pwrite(target, whole[start : min(end, start + (64 << 20))], start)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """From where to where there is data; the rest are holes."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def digest(fd: int) -> str:
    """SHA-256 over the content, whatever of its zeros are holes: forks fill holes, and that changes nothing."""
    size = os.fstat(fd).st_size
    found = hashlib.sha256(b"%d\n" % size)
    done = 0
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
        for start, end in extents(fd):
            for at in range(max(done, start - start % _BLOCK), end, _BLOCK):
                block = view[at : at + _BLOCK]
                if block != _ZEROS[: len(block)]:
                    found.update(b"%d\n" % at)
                    found.update(block)
                done = at + _BLOCK
    return found.hexdigest()


def held(fd: int) -> int:
    """Bytes of the host's memory (or disk) that it takes."""
    return os.fstat(fd).st_blocks * 512
