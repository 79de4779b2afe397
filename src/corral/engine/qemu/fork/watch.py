"""A userfaultfd on another process's memory, so that the kernel notes which pages it writes.

Such a descriptor can only be made by the process itself, and QEMU has no reason to. So QEMU's main thread is stopped
for a moment (ptrace), made to run that one system call where its own code has a ``syscall`` instruction (in the vDSO),
and put back where it was; then the descriptor is fetched with pidfd_getfd. QEMU keeps its copy, which the next look
finds and uses again. This is what a debugger's ``call`` does; it needs the right that reading another process's memory
needs too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_SEIZE, _INTERRUPT, _DETACH, _GETREGSET, _SETREGSET, _SINGLESTEP = 0x4206, 0x4207, 17, 0x4204, 0x4205, 9
_NT_PRSTATUS = 1
_WALL = 0x40000000
_SYS_PIDFD_GETFD = 438
_CLOEXEC, _NONBLOCK, _USER_MODE_ONLY = os.O_CLOEXEC, os.O_NONBLOCK, 1
_NAME = "anon_inode:[userfaultfd]"

# x86-64: the order of struct user_regs_struct, and what a system call wants where.
_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
_SYS_USERFAULTFD = 323
_SYSCALL_INSTRUCTION = b"\x0f\x05"

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


_SPINS, _LOOKS = 100, 1000
"""Looks for a stop: the first without a pause, then one a millisecond, for a second in all."""


class Unwatchable(Exception):
    """The memory of this process cannot be watched here; says why."""


class _Signalled(Unwatchable):
    """A signal came in between. It is delivered when the process is let go."""

    def __init__(self, number: int) -> None:
        super().__init__(f"it got signal {number} meanwhile")
        self.number = number


def userfaultfd(pid: int, pidfd: int) -> int:
    """A descriptor of ``pid``'s userfaultfd; it is made when there is none. Raises Unwatchable.

    Blocks for about a millisecond.
    """
    number = _present(pid)
    if number is None:
        if platform.machine() != "x86_64":
            raise Unwatchable(f"not known how to call into a process on {platform.machine()}")
        # The tracer is a thread, and whatever happens the kernel lets its tracees go when it ends.
        with ThreadPoolExecutor(1) as tracer:
            number = tracer.submit(_make, pid).result()
    fetched = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if fetched < 0:
        raise Unwatchable(f"fetch userfaultfd: {os.strerror(ctypes.get_errno())}")
    os.set_inheritable(fetched, False)
    return int(fetched)


def _present(pid: int) -> int | None:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()) == _NAME:
                return int(entry.name)
        except FileNotFoundError:  # it was closed meanwhile
            continue
    return None


def _make(pid: int) -> int:
    instruction = _instruction(pid)
    with _stopped(pid):
        before = _get(pid)
        call = dict(before)
        # No "original" call number: else the kernel could take the answer for a call that is to be restarted.
        call |= {
            "rip": instruction, "rax": _SYS_USERFAULTFD, "orig_rax": (1 << 64) - 1,
            "rdi": _CLOEXEC | _NONBLOCK | _USER_MODE_ONLY,
        }  # fmt: skip
        _set(pid, call)
        try:
            _check("step", libc.ptrace(_SINGLESTEP, pid, None, None))
            _wait(pid, signal.SIGTRAP)
            answer = ctypes.c_int64(_get(pid)["rax"]).value
        finally:
            _set(pid, before)
    if answer < 0:
        raise Unwatchable(f"userfaultfd: {os.strerror(-answer)}")
    return answer


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """The main thread stands still for as long as the block runs."""
    _check("seize", libc.ptrace(_SEIZE, pid, None, None))
    missed = 0
    try:
        _check("interrupt", libc.ptrace(_INTERRUPT, pid, None, None))
        _wait(pid, signal.SIGTRAP)
        yield
    except _Signalled as error:
        missed = error.number
        raise
    finally:
        libc.ptrace(_DETACH, pid, None, missed)


def _instruction(pid: int) -> int:
    """Address of a ``syscall`` instruction in the vDSO of the process."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - unbuffered
                memory.seek(start)
                place = memory.read(end - start).find(_SYSCALL_INSTRUCTION)
            if place >= 0:
                return start + place
    raise Unwatchable("no system call in its vDSO")


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _get(pid: int) -> dict[str, int]:
    values = (ctypes.c_uint64 * len(_REGISTERS))()
    vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
    _check("registers", libc.ptrace(_GETREGSET, pid, _NT_PRSTATUS, ctypes.byref(vector)))
    return dict(zip(_REGISTERS, values, strict=True))


def _set(pid: int, registers: dict[str, int]) -> None:
    values = (ctypes.c_uint64 * len(_REGISTERS))(*(registers[name] for name in _REGISTERS))
    vector = _Vector(ctypes.addressof(values), ctypes.sizeof(values))
    _check("registers", libc.ptrace(_SETREGSET, pid, _NT_PRSTATUS, ctypes.byref(vector)))


def _wait(pid: int, expected: int) -> None:
    """Until the thread has stopped: at once, unless it hangs in the kernel. Leaves its end for others to wait for."""
    options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG | _WALL
    nap = select.poll()
    for look in range(_LOOKS):
        seen = os.waitid(os.P_PID, pid, options)
        if seen is not None and seen.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
            raise Unwatchable("the process has ended")
        if seen is not None:
            if seen.si_status & 0xFF != expected:
                raise _Signalled(seen.si_status & 0xFF)
            return
        if look > _SPINS:
            nap.poll(1)
    raise Unwatchable("its main thread hangs in the kernel")


def _check(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        hint = " (CAP_SYS_PTRACE is needed)" if number == errno.EPERM else ""
        raise Unwatchable(f"{what}: {os.strerror(number)}{hint}")
