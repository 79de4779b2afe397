"""The pages of guest memory that a QEMU process has of its own, found and copied from outside.

Its RAM is one private mapping: anonymous for a machine that booted, a template's memory for a fork. Either way the
pages it wrote are those that are present (or swapped out) and belong to no file; the kernel tells them apart in
/proc/PID/pagemap. With PAGEMAP_SCAN (Linux 6.7) and a userfaultfd (:mod:`~corral.engine.qemu.fork.watch`) it also
tells which were written *since the last look*, so that nearly all is copied while the machine runs.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from corral.engine.qemu.fork.watch import Unwatchable, userfaultfd

PAGE = mmap.PAGESIZE
_ZERO_PAGE = bytes(PAGE)
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_UFFD_API, _WP_ASYNC, _MODE_WP = 0xAA, 1 << 15, 1 << 1
_PAGEMAP_SCAN = 0xC0606610
_PROTECT, _CHECK_ASYNC = 1 << 0, 1 << 1
_WRITTEN, _FILE, _PRESENT, _SWAPPED, _PFN_ZERO = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_REGIONS = 4096
"""Answers of one scan."""
_VECTORS = 512
"""Pieces of one process_vm_readv; the kernel takes 1024."""
_PIECE = 4 << 20
_MOST = 1 << 30
"""Bytes of one process_vm_readv; the kernel ends a little below twice that."""

libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t


class Run(NamedTuple):
    """Pages one after another: bytes from ``start`` to ``end`` of guest memory."""

    start: int
    end: int


def total(runs: Iterable[Run]) -> int:
    """Bytes."""
    return sum(run.end - run.start for run in runs)


class Unreadable(Exception):
    """The memory of this process cannot be found or read; says why."""


class Memory:
    """Guest memory of the QEMU process ``pid``: ``size`` bytes at address ``base`` in it. A context manager.

    Between :meth:`watch` and :meth:`unwatch`, :meth:`written` tells what changed since it was last asked.
    """

    def __init__(self, pid: int, pidfd: int, size: int) -> None:
        self.pid, self.size = pid, size
        self._pidfd = pidfd
        self.base = _find(pid, size)
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._watch: int | None = None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unwatch()
        os.close(self._pagemap)

    def watch(self) -> None:
        """Have writes noted from now on. Raises Unwatchable where that cannot be."""
        fd = userfaultfd(self.pid, self._pidfd)
        try:
            try:
                fcntl.ioctl(fd, _UFFDIO_API, struct.pack("=3Q", _UFFD_API, _WP_ASYNC, 0))
            except OSError as error:
                if error.errno != errno.EINVAL:  # it has been introduced before, by a daemon that is gone
                    raise
            # What a daemon that was killed had noted is of no use: begin with everything counted as written.
            fcntl.ioctl(fd, _UFFDIO_UNREGISTER, struct.pack("=2Q", self.base, self.size))
            fcntl.ioctl(fd, _UFFDIO_REGISTER, struct.pack("=4Q", self.base, self.size, _MODE_WP, 0))
            self._watch = fd
            self._scan(_CHECK_ASYNC, limit=PAGE)  # whether this kernel can do it at all
        except OSError as error:
            self._watch = None
            os.close(fd)
            raise Unwatchable(error.strerror or str(error)) from error

    def unwatch(self) -> None:
        """Have nothing noted any more, if anything was."""
        if self._watch is not None:
            try:
                fcntl.ioctl(self._watch, _UFFDIO_UNREGISTER, struct.pack("=2Q", self.base, self.size))
            except OSError as error:
                if error.errno not in (errno.ESRCH, errno.ENOMEM, errno.EINVAL):  # the process has ended
                    raise
            os.close(self._watch)
            self._watch = None

    def own(self) -> list[Run]:
        """All pages that are its own. Where writes are watched, that is the first look of :meth:`written`."""
        return self.written() if self._watch is not None else self._from_pagemap()

    def written(self) -> list[Run]:
        """Own pages that were written since the last look, in order."""
        assert self._watch is not None, "nobody notes what is written"
        return self._scan(_PROTECT | _CHECK_ASYNC, limit=self.size)

    def _scan(self, flags: int, limit: int) -> list[Run]:
        """All runs of written pages of its own in the first ``limit`` bytes."""
        found = (ctypes.c_uint64 * (3 * _REGIONS))()
        runs: list[Run] = []
        at, end = self.base, self.base + limit
        unwanted = _FILE | _PFN_ZERO
        present = _PRESENT | _SWAPPED  # what is not there counts as written, too
        while at < end:
            arguments = array.array(
                "Q",
                (96, flags, at, end, 0, ctypes.addressof(found), _REGIONS, 0,
                 unwanted, _WRITTEN | unwanted, present, _WRITTEN),
            )  # fmt: skip
            count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, arguments, True)
            for first in range(0, 3 * count, 3):
                _append(runs, found[first] - self.base, found[first + 1] - self.base)
            at = arguments[4]
        return runs

    def _from_pagemap(self) -> list[Run]:
        """The same from the plain pagemap, which every kernel has: bit 63 present, 62 swapped, 61 of a file."""
        runs: list[Run] = []
        for first in range(0, self.size, _PIECE):
            length = min(_PIECE, self.size - first) // PAGE
            raw = os.pread(self._pagemap, 8 * length, (self.base + first) // PAGE * 8)
            for number, entry in enumerate(array.array("Q", raw)):
                if entry >> 62 and not entry >> 61 & 1:
                    _append(runs, first + number * PAGE, first + (number + 1) * PAGE)
        return runs

    def copy(self, runs: Iterable[Run], target: mmap.mmap) -> None:
        """Copy runs to the same places in ``target``."""
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(target))
        for group in _groups(runs, _MOST):
            self._read([(address + run.start, run) for run in group])
        del view  # an mmap with views on it cannot be closed

    def copy_sparse(self, runs: Iterable[Run], target: mmap.mmap) -> int:
        """Like :meth:`copy` into a ``target`` that is zero there, leaving pages of zeros alone. Bytes written."""
        copied = 0
        with mmap.mmap(-1, _PIECE) as scratch:
            address = ctypes.addressof(view := ctypes.c_char.from_buffer(scratch))
            for group in _groups(runs, _PIECE):
                self._read(list(_laid(address, group)))
                at = 0
                for run in group:
                    for place in range(run.start, run.end, PAGE):
                        page = scratch[at : at + PAGE]
                        at += PAGE
                        if page != _ZERO_PAGE:
                            target[place : place + PAGE] = page
                            copied += PAGE
            del view
        return copied

    def _read(self, pieces: list[tuple[int, Run]]) -> None:
        """Copy runs to addresses in this process."""
        local, remote = array.array("Q"), array.array("Q")  # of struct iovec: address, length
        for address, run in pieces:
            local.extend((address, run.end - run.start))
            remote.extend((self.base + run.start, run.end - run.start))
        wanted = sum(local[1::2])
        ours, its = (ctypes.c_void_p(vector.buffer_info()[0]) for vector in (local, remote))
        got = libc.process_vm_readv(self.pid, ours, len(pieces), its, len(pieces), 0)
        if got < 0:
            raise Unreadable(f"read guest memory: {os.strerror(ctypes.get_errno())}")
        if got != wanted:
            raise Unreadable(f"read guest memory: {got} of {wanted} bytes")


def _find(pid: int, size: int) -> int:
    """Where guest memory is mapped: the one private, writable mapping of exactly that size."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in place.split("-"))
        if end - start == size and rights == "rw-p" and (not name or name[0].startswith("/memfd:")):
            found.append(start)
    if len(found) != 1:
        raise Unreadable(f"{len(found)} mappings look like guest memory")
    return found[0]


def _append(runs: list[Run], start: int, end: int) -> None:
    if runs and runs[-1].end == start:
        runs[-1] = Run(runs[-1].start, end)
    else:
        runs.append(Run(start, end))


def _groups(runs: Iterable[Run], most: int) -> Iterator[list[Run]]:
    """Runs in groups for one system call each: ``_VECTORS`` of them and ``most`` bytes; long ones are cut."""
    group: list[Run] = []
    length = 0
    for run in runs:
        start = run.start
        while start < run.end:
            end = min(run.end, start + most - length)
            group.append(Run(start, end))
            length += end - start
            start = end
            if length == most or len(group) == _VECTORS:
                yield group
                group, length = [], 0
    if group:
        yield group


def _laid(address: int, group: Iterable[Run]) -> Iterator[tuple[int, Run]]:
    """Each run with its place, one after the other from ``address``."""
    for run in group:
        yield address, run
        address += run.end - run.start
