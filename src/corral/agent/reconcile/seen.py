"""What a decision is made from: one VM as it is seen, in its process, its guest, and on the way into running."""

from __future__ import annotations

from typing import NamedTuple

from corral.engine.protocol import Exit, State

OFF_STATES = (State.ABSENT, State.EXITED)


class GuestView(NamedTuple):
    """What is known of the agent inside. ``booting``: this boot has not answered yet and may take its time.

    ``silent_s``: since it was last heard. ``hung_s``: since it was called hung. ``gone``: nobody in the guest holds the
    agent's port open, so that its silence says nothing about the guest.
    """

    expected: bool = False
    answered: bool = False
    booting: bool = False
    hung: bool = False
    silent_s: float = 0.0
    trouble: str = ""
    """Why a fork's guest is not somebody of its own yet."""
    hung_s: float = 0.0
    gone: bool = False


class Gate(NamedTuple):
    """Whether a VM may start now. ``error``: waiting will not help."""

    reason: str = ""
    error: bool = False
    again_s: float | None = None


class Seen(NamedTuple):
    """What is seen of one VM. Times are seconds since, on the agent's own clock; None: not so, or not known."""

    state: State
    exit: Exit | None = None
    epoch: int = 0
    guest: GuestView = GuestView()
    gate: Gate = Gate()
    asked_s: float | None = None
    """Since its guest was first asked to power off, in this boot."""
    repeat_s: float | None = None
    """Since it was last asked."""
    heard: bool = False
    """Its agent took the request."""
    running_s: float | None = None
    """Since its CPUs were let run."""
    ending_s: float | None = None
    stalled_s: float | None = None
    """Since it stands still because of its disk, as far as it was not let go on since."""
    fault: str = ""
    """Why it stands still: ``disk-full`` or ``disk-error``."""
    disk_error_s: float | None = None
    """Since a read or write failed, and the guest was told."""
    disk_words: str = ""
    silent_s: float | None = None
    """Since the hypervisor was found not to answer several times in a row."""
    starved: bool = False
    """It stands still at its limit of memory, as somebody told the kernel to have it: then it answers nothing."""
    oom: bool = False
    """The kernel ended a process of it for memory."""
