"""What can befall a VM on its host: the names, how soon each is noticed, and what follows. One table, and no I/O.

Names are stable: they stand in ``status.cause`` while they matter, and each has an event. Which one it is follows from
what is seen (:mod:`corral.agent.reconcile`); when a VM starts again follows from :mod:`corral.scheduler.restart`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from corral.agent.settings import Settings
from corral.engine.protocol import Exit


class Cause(StrEnum):
    """What befell it."""

    GUEST_POWERED_OFF = "guest-powered-off"
    GUEST_PANIC = "guest-panic"
    GUEST_HANG = "guest-hang"
    GUEST_SILENT = "guest-silent"
    AGENT_GONE = "agent-gone"
    QEMU_SILENT = "qemu-silent"
    QEMU_KILLED = "qemu-killed"
    QEMU_CRASHED = "qemu-crashed"
    QEMU_GONE = "qemu-gone"
    OUT_OF_MEMORY = "out-of-memory"
    HOST_RESTARTED = "host-restarted"
    START_FAILED = "start-failed"
    DISK_FULL = "disk-full"
    DISK_ERROR = "disk-error"


class Policy(StrEnum):
    """What is done about it."""

    STOP = "stays off, unless the restart policy is always"
    RESTART = "starts again by the restart policy, with growing delays; poison after so many in a row"
    AT_ONCE = "starts again at once, if the restart policy is not never; not counted"
    CUT = "called unresponsive; after more patience the power is cut (on_hang) and the restart policy follows"
    RETRY = "stands still, and is tried again until it goes on"
    TELL = "is told, nothing else"


class Row(NamedTuple):
    """``within``: seconds until it is noticed, at most, on a host that is not overloaded. ``console``: the event tells
    the last lines of the serial console."""

    event: str
    severity: str
    policy: Policy
    within: Callable[[Settings], float]
    seen: str
    """How it is noticed."""
    console: bool = False


PROMPT_S = 5.0
"""The kernel or QEMU tells at once; the rest is a look at the machine and a write, on a busy host."""
ANSWER_S = 2.0
"""What a look at a silent QEMU takes."""


def _prompt(_settings: Settings) -> float:
    return PROMPT_S


def _hang(s: Settings) -> float:
    """Beats come with a tenth of jitter, and each takes its time-out to be missed."""
    return s.misses * (1.1 * s.heartbeat_s + s.heartbeat_timeout_s)


def _silent(s: Settings) -> float:
    """A first missed beat has QEMU looked at, at each beat from then on."""
    return 1.1 * s.heartbeat_s + s.heartbeat_timeout_s + s.misses * (1.1 * s.heartbeat_s + ANSWER_S)


C = Cause
TABLE: dict[Cause, Row] = {
    C.GUEST_POWERED_OFF: Row("GuestPoweredOff", "info", Policy.STOP, _prompt, "QEMU tells why it ends"),
    C.GUEST_PANIC: Row("GuestPanic", "error", Policy.RESTART, _prompt, "the guest's kernel tells by pvpanic", True),
    C.GUEST_HANG: Row("GuestHang", "error", Policy.CUT, _hang, "its agent misses heartbeats in a row", True),
    C.GUEST_SILENT: Row(
        "GuestSilent", "warning", Policy.TELL, lambda s: s.boot_patience_s, "its agent never answered in this boot",
        True,
    ),
    C.AGENT_GONE: Row("AgentGone", "warning", Policy.TELL, _hang, "heartbeats are missed, its agent's port is closed"),
    C.QEMU_SILENT: Row("QemuSilent", "error", Policy.CUT, _silent, "QEMU answers no question in a row"),
    C.QEMU_KILLED: Row("QemuKilled", "error", Policy.RESTART, _prompt, "its process ended by SIGKILL or SIGTERM"),
    C.QEMU_CRASHED: Row("QemuCrashed", "error", Policy.RESTART, _prompt, "its process ended by itself"),
    C.QEMU_GONE: Row(
        "QemuGone", "error", Policy.RESTART, _prompt, "its process ended, and it was no child of this daemon"
    ),
    C.OUT_OF_MEMORY: Row(
        "OutOfMemory", "error", Policy.RESTART, _prompt, "its process ended, and its control group counts an OOM kill"
    ),
    C.HOST_RESTARTED: Row("HostRestarted", "warning", Policy.AT_ONCE, _prompt, "its process is of an earlier boot"),
    C.START_FAILED: Row("StartFailed", "error", Policy.RESTART, _prompt, "a step of its start failed"),
    C.DISK_FULL: Row("DiskFull", "error", Policy.RETRY, _prompt, "QEMU stops it at the write that found no space"),
    C.DISK_ERROR: Row("DiskError", "error", Policy.TELL, _prompt, "QEMU tells; the guest got the error as from a disk"),
}  # fmt: skip

CUT = (Cause.GUEST_HANG, Cause.QEMU_SILENT)
"""Ends that we make: written down first, then the power is cut."""


class End(NamedTuple):
    """How a process ended: its name, and a sentence."""

    cause: Cause
    words: str


def end_of(end: Exit | None, *, oom: bool) -> End:
    """Name an end. ``oom``: the kernel ended a process of this VM for memory."""
    if end is None or end.reason == "vanished":
        words = end.last_words.strip().splitlines() if end is not None else []
        return End(C.OUT_OF_MEMORY, OOM) if oom else End(C.QEMU_GONE, _with("its QEMU ended, nobody saw how", words))
    if end.reason in ("guest-shutdown", "guest-reset"):
        return End(C.GUEST_POWERED_OFF, "the guest powered off")
    if end.reason == "guest-panic":
        return End(C.GUEST_PANIC, PANIC)
    if oom:
        return End(C.OUT_OF_MEMORY, OOM)
    if end.reason == "never-started":
        return End(C.START_FAILED, "its QEMU was never started")
    if end.reason == "host-reboot":
        return End(C.HOST_RESTARTED, "its host was restarted")
    how = f"signal {end.signal}" if end.signal else f"status {end.code}" if end.code is not None else end.reason
    killed = end.signal in (9, 15) or end.reason in ("host-signal", "killed")
    cause = C.QEMU_KILLED if killed else C.QEMU_CRASHED
    return End(cause, _with(f"its QEMU ended ({how or 'unknown how'})", end.last_words.strip().splitlines()))


OOM = "the kernel ended its QEMU for memory"
PANIC = "the guest's kernel panicked"


def _with(text: str, words: list[str]) -> str:
    """With the last thing that QEMU said."""
    return text + (f": {words[-1][:300]}" if words else "")
