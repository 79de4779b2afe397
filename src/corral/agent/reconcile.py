"""Decides what to do next about one VM. Pure: (record, what is seen, now) → one decision, no I/O, no clock.

Level-triggered: nothing here remembers what was done before. A decision does one thing, the world is looked at again,
and the next one follows, until it says REST. The rows of :data:`TABLE` are (what is wanted, what the hypervisor says)
→ a rule; each rule reads as a sentence. :mod:`corral.agent.steps` does what is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from corral.agent.failure import CUT, PANIC, Cause, end_of
from corral.agent.settings import Settings
from corral.engine.protocol import Exit, State
from corral.model import OnHang, Phase, Power, Restart, Vm
from corral.units import format_duration


class Do(StrEnum):
    """What is to be done."""

    REST = "rest"
    """Nothing: write down what is seen."""
    START = "start"
    """Volume, seed, ports, a process, let it run."""
    RESUME = "resume"
    PAUSE = "pause"
    RESET = "reset"
    ASK = "ask"
    """Ask the guest to power off."""
    KILL = "kill"
    FORGET = "forget"
    """Remove the trace of a process that ended."""
    END = "end"
    """It ended unasked: count it, and let the restart policy say what follows."""
    TEARDOWN = "teardown"
    """Remove everything the VM owned, its record last."""
    QUARANTINE = "quarantine"
    """What is seen contradicts the record: touch nothing, tell people."""


class Wish(StrEnum):
    """What the record asks for, as far as the next step is concerned."""

    GONE = "gone"
    OFF = "off"
    CYCLE = "cycle"
    """Off first, then on: a restart that is not done yet."""
    RUN = "run"
    HOLD = "hold"
    """Paused."""


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


class Decision(NamedTuple):
    """What to do, what to write down first, and when to look again (seconds; None: when something changes)."""

    do: Do
    phase: Phase
    reason: str = ""
    again: float | None = None
    sure: bool = True
    """False: the phase is only what was known before; it does not answer a new wish (``status.observed`` stays)."""
    cause: str = ""
    """Why the phase is not what was asked for, as one of :class:`~corral.agent.failure.Cause`."""


Rule = Callable[[Vm, Seen, float, Settings], Decision]

OFF_STATES = (State.ABSENT, State.EXITED)
LIVED = (Phase.RUNNING, Phase.PAUSED, Phase.UNRESPONSIVE, Phase.UNKNOWN)
"""Phases in which a process was there: if it is gone now, it ended without being asked to."""


def wish_of(vm: Vm, state: State) -> Wish:
    """What the record asks for."""
    if vm.meta.deleted is not None:
        return Wish.GONE
    if vm.spec.power is Power.STOPPED:
        return Wish.OFF
    if vm.spec.boots > vm.status.boots and state not in OFF_STATES:
        return Wish.CYCLE
    return Wish.HOLD if vm.spec.power is Power.PAUSED else Wish.RUN


def _kept(vm: Vm, do: Do, again: float | None = None, *, sure: bool = True) -> Decision:
    """Do something, and let what is written about the VM stand."""
    status = vm.status
    return Decision(do, status.phase, status.reason, again, sure, status.cause)


def decide(vm: Vm, seen: Seen, now: float, settings: Settings) -> Decision:
    """The next decision about a VM. ``now``: wall time (only compared with times in the record)."""
    if seen.epoch > vm.status.epoch and seen.state is not State.ABSENT:
        text = f"its process belongs to epoch {seen.epoch}, the record says {vm.status.epoch}: the record is too old"
        return Decision(Do.QUARANTINE, Phase.UNKNOWN, text)
    return TABLE[wish_of(vm, seen.state), seen.state](vm, seen, now, settings)


# The rules. Each is asked only in the rows of the table in which it stands.


def kill(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    reason = "being deleted" if vm.meta.deleted is not None else "the power is being cut"
    return Decision(Do.KILL, Phase.STOPPING, reason)


def teardown(_vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return Decision(Do.TEARDOWN, Phase.STOPPING, "being deleted")


def stopped(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """It is off and is to be off. Why it went off stays readable until the owner asks for something else."""
    told = vm.status.phase is Phase.STOPPED and vm.status.observed == vm.meta.generation
    return _kept(vm, Do.REST) if told else Decision(Do.REST, Phase.STOPPED)


def forget(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return _told(vm, Do.FORGET, "stopping")


def _told(vm: Vm, do: Do, otherwise: str, again: float | None = None) -> Decision:
    """What was written about an end that nobody asked for stays; else it is a stop under way."""
    status = vm.status
    if status.observed == vm.meta.generation and status.phase in (Phase.STOPPED, Phase.PENDING, Phase.ERROR):
        return _kept(vm, do, again)
    return Decision(do, Phase.STOPPING, otherwise, again)


def ask_off(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """Ask, ask again now and then, complain after a while; cut the power only when told to."""
    if vm.spec.force:
        return Decision(Do.KILL, Phase.STOPPING, "the power is being cut")
    # A guest that was still booting did not hear; it is asked again as soon as it answers.
    answers_now = seen.guest.answered and not seen.heard and (seen.repeat_s or 0.0) >= 1.0
    if seen.repeat_s is None or seen.repeat_s >= s.stop_repeat_s or answers_now:
        return Decision(Do.ASK, Phase.STOPPING, _asked(seen, s))
    return Decision(Do.REST, Phase.STOPPING, _asked(seen, s), again=s.stop_repeat_s - seen.repeat_s)


def _asked(seen: Seen, s: Settings) -> str:
    if seen.asked_s is None or seen.asked_s < s.stop_patience_s:
        return "the guest is asked to power off"
    return f"the guest has not powered off for {format_duration(s.stop_patience_s)}; --force cuts the power"


def stalled_to_stop(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """A guest that stands still because of its disk cannot power itself off, unless it can go on."""
    if vm.spec.force:
        return Decision(Do.KILL, Phase.STOPPING, "the power is being cut")
    text = "the guest stands still, its disk on the host is full; --force cuts the power"
    waited = seen.stalled_s or 0.0
    if waited < s.stall_retry_s:
        return Decision(Do.REST, Phase.STOPPING, text, s.stall_retry_s - waited, cause=seen.fault)
    return Decision(Do.RESUME, Phase.STOPPING, text, cause=seen.fault)


def wake_to_stop(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """A paused guest cannot power itself off: let it run first."""
    if vm.spec.force:
        return Decision(Do.KILL, Phase.STOPPING, "the power is being cut")
    return Decision(Do.RESUME, Phase.STOPPING, "the guest is asked to power off")


def ending(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """The guest is off, its process is about to end."""
    text, waited = "the guest is off, its process ends", seen.ending_s or 0.0
    if waited >= s.ending_s:
        return _told(vm, Do.KILL, text)
    return _told(vm, Do.REST, text, again=max(0.1, s.ending_s - waited))


def silent_to_stop(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    if vm.spec.force:
        return Decision(Do.KILL, Phase.STOPPING, "the power is being cut")
    if seen.silent_s is None:
        return Decision(Do.REST, Phase.STOPPING, "the guest is asked to power off", again=s.heartbeat_s)
    text = "QEMU does not answer; --force cuts the power"
    return Decision(Do.REST, Phase.UNRESPONSIVE, text, s.heartbeat_s, cause=Cause.QEMU_SILENT)


def begin(vm: Vm, seen: Seen, now: float, s: Settings) -> Decision:
    """No process and no trace of one. Start it, unless it ended unasked, is given up, or has to wait."""
    status = vm.status
    fresh_wish = status.observed != vm.meta.generation
    if status.phase in LIVED and vm.spec.boots <= status.boots:
        text = "its QEMU is gone without a trace (was the host restarted?)"
        return Decision(Do.END, status.phase, text, cause=Cause.QEMU_GONE)
    if status.phase is Phase.ERROR and not fresh_wish:
        return _kept(vm, Do.REST)
    if status.retry_at is not None and not fresh_wish and now < status.retry_at:
        # A wall clock that was set back must not keep a VM down for longer than the backoff ever asks for.
        again = min(status.retry_at - now, s.backoff_most_s)
        return Decision(Do.REST, Phase.PENDING, status.reason, again, cause=status.cause)
    if seen.gate.error:
        return Decision(Do.REST, Phase.ERROR, seen.gate.reason)
    if seen.gate.reason:
        return Decision(Do.REST, Phase.PENDING, seen.gate.reason, again=seen.gate.again_s, cause=status.cause)
    return Decision(Do.START, Phase.STARTING)


def ended(vm: Vm, seen: Seen, _now: float, _s: Settings) -> Decision:
    """A trace of a process that ended. Was it ours to end?"""
    status = vm.status
    if vm.spec.boots > status.boots or status.phase is Phase.STOPPING:
        return Decision(Do.FORGET, Phase.STOPPING, "restarting")
    if status.phase not in (*LIVED, Phase.STARTING):
        return _kept(vm, Do.FORGET)
    if seen.asked_s is not None:
        return Decision(Do.FORGET, Phase.STOPPING, "stopped, and wanted again")
    cause, words = end_of(seen.exit, oom=seen.oom)
    return Decision(Do.END, status.phase, words, cause=cause)


def run_it(_vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return Decision(Do.RESUME, Phase.STARTING)


def wake(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """Paused and wanted running."""
    return Decision(Do.RESUME, vm.status.phase if vm.status.phase is Phase.STARTING else Phase.PAUSED)


def stalled(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """It stands still because of its disk. Trying at once again would only burn CPU."""
    why = "the disk on the host is full" if seen.fault == Cause.DISK_FULL else "a disk of the host failed"
    text = f"stands still, {why}; tried again every {format_duration(s.stall_retry_s)}, nothing is lost"
    waited = seen.stalled_s or 0.0
    if waited < s.stall_retry_s:
        return Decision(Do.REST, Phase.UNRESPONSIVE, text, s.stall_retry_s - waited, cause=seen.fault)
    return Decision(Do.RESUME, Phase.UNRESPONSIVE, text, cause=seen.fault)


def running(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """Its CPUs run. It counts as running when its agent answers (or none is expected)."""
    if _given_up(vm):
        return _kept(vm, Do.KILL)
    if vm.spec.resets > vm.status.resets:
        return Decision(Do.RESET, Phase.STARTING, "reset")
    guest, phase, up = seen.guest, vm.status.phase, seen.running_s or 0.0
    if (left := _going_off(vm, seen, s)) > 0:
        text = "the guest was asked to power off before; it is started again when it has"
        return Decision(Do.REST, Phase.STOPPING, text, again=left)
    if phase is Phase.UNRESPONSIVE and vm.status.cause == Cause.DISK_FULL and up < s.stall_settle_s:
        return _kept(vm, Do.REST, again=s.stall_settle_s - up)
    if not guest.expected or (guest.answered and not guest.hung):
        return _well(seen, s)
    if guest.hung:
        return hung(vm, seen, s)
    if guest.booting or phase not in (Phase.RUNNING, Phase.UNRESPONSIVE):
        if up >= s.boot_patience_s:
            text = f"the guest's agent has not answered {format_duration(s.boot_patience_s)} after the start"
            return Decision(Do.REST, Phase.UNRESPONSIVE, text, cause=Cause.GUEST_SILENT)
        text = (
            f"the guest has no identity of its own yet: {guest.trouble}"
            if guest.trouble
            else "waits for the guest to answer"
        )
        return Decision(Do.REST, Phase.STARTING, text, again=s.boot_patience_s - up)
    # Adopted: what was known holds until the guest is heard of.
    return _kept(vm, Do.REST, sure=False)


def _going_off(vm: Vm, seen: Seen, s: Settings) -> float:
    """Seconds for which a stop that was superseded may still end it: the request cannot be taken back.

    A guest whose agent did not take the request may not heed it. One that a daemon before this one began to stop may
    have been asked: that counts from the first look.
    """
    if vm.status.phase is not Phase.STOPPING and seen.asked_s is None:
        return 0.0
    waited = seen.asked_s if seen.asked_s is not None else seen.running_s or 0.0
    patience = s.stop_patience_s if seen.heard else s.stop_repeat_s
    return patience - waited


def _well(seen: Seen, s: Settings) -> Decision:
    """It runs. A disk that failed a moment ago is still worth a word: the guest may have taken it badly."""
    if seen.disk_error_s is None or seen.disk_error_s >= s.disk_error_s:
        return Decision(Do.REST, Phase.RUNNING)
    text = f"a disk of the host failed, and the guest was told ({seen.disk_words})"
    return Decision(Do.REST, Phase.RUNNING, text, s.disk_error_s - seen.disk_error_s, cause=Cause.DISK_ERROR)


def hung(vm: Vm, seen: Seen, s: Settings) -> Decision:
    """The guest is silent although its CPUs run. Only one that was known to answer has its power cut, after a while."""
    guest, status = seen.guest, vm.status
    if guest.gone:
        text = "its guest agent was ended inside; the guest itself may be well"
        return Decision(Do.REST, Phase.UNRESPONSIVE, text, cause=Cause.AGENT_GONE)
    silent = f"the guest has not answered for {format_duration(guest.silent_s)}"
    # It spoke in this boot, and it was the agent of ours: that one answers whatever else the guest is busy with.
    acts = _may_cut(vm) and not guest.booting and status.guest == "corral-guest"
    if acts and guest.hung_s >= s.hang_patience_s:
        return Decision(Do.END, status.phase, f"the guest hung: {silent}", cause=Cause.GUEST_HANG)
    text = silent + (f"; its power is cut {format_duration(s.hang_patience_s)} after that" if acts else "")
    again = s.hang_patience_s - guest.hung_s if acts else None
    # The figure grows with each look; what was written first is enough to know since when.
    said = status.phase is Phase.UNRESPONSIVE and status.observed == vm.meta.generation
    if said and status.cause == Cause.GUEST_HANG:
        return _kept(vm, Do.REST, again=again)
    return Decision(Do.REST, Phase.UNRESPONSIVE, text, again, cause=Cause.GUEST_HANG)


def _may_cut(vm: Vm) -> bool:
    """Its owner lets us cut its power when it hangs."""
    return vm.spec.on_hang is OnHang.RESTART and vm.spec.restart is not Restart.NEVER


def _given_up(vm: Vm) -> bool:
    """Its end is written down already, and its process lives: nobody can have started it again since."""
    return vm.status.phase in (Phase.PENDING, Phase.ERROR) and vm.status.cause in CUT


def went_off(vm: Vm, seen: Seen, now: float, s: Settings) -> Decision:
    """The guest powered itself off; nobody had asked, unless we had."""
    if vm.status.phase in (*LIVED, Phase.STARTING) and seen.asked_s is None:
        return Decision(Do.END, vm.status.phase, "the guest powered off", cause=Cause.GUEST_POWERED_OFF)
    return ending(vm, seen, now, s)


def panicked(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """Write the end down before the process is killed: afterwards nobody could tell why it ended."""
    if vm.status.phase in (*LIVED, Phase.STARTING):
        return Decision(Do.END, vm.status.phase, PANIC, cause=Cause.GUEST_PANIC)
    return _kept(vm, Do.KILL)


def silent(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """QEMU lives and does not answer: wait long, it may come back; never a kill on a guess."""
    if _given_up(vm):
        return _kept(vm, Do.KILL)
    if seen.silent_s is None:
        return _kept(vm, Do.REST, s.heartbeat_s, sure=False)
    acts = _may_cut(vm) and vm.status.phase in (*LIVED, Phase.STARTING)
    if acts and seen.silent_s >= s.silent_patience_s:
        text = f"its QEMU did not answer for {format_duration(s.silent_patience_s)}"
        return Decision(Do.END, vm.status.phase, text, cause=Cause.QEMU_SILENT)
    text = "QEMU does not answer" + (": it stands still at its limit of memory" if seen.starved else "")
    text += f"; its power is cut {format_duration(s.silent_patience_s)} after that" if acts else ""
    return Decision(Do.REST, Phase.UNRESPONSIVE, text, s.heartbeat_s, cause=Cause.QEMU_SILENT)


def pause(vm: Vm, seen: Seen, _now: float, _s: Settings) -> Decision:
    if vm.spec.resets > vm.status.resets:
        return Decision(Do.RESET, vm.status.phase, "reset")
    return Decision(Do.PAUSE, vm.status.phase, "being paused")


def paused(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    if vm.spec.resets > vm.status.resets:
        return Decision(Do.RESET, Phase.PAUSED, "reset")
    return Decision(Do.REST, Phase.PAUSED)


W, S = Wish, State
TABLE: dict[tuple[Wish, State], Rule] = {
    # wanted     absent                     exited                     created               running
    (W.GONE, S.ABSENT): teardown, (W.GONE, S.EXITED): teardown, (W.GONE, S.CREATED): kill, (W.GONE, S.RUNNING): kill,
    (W.OFF, S.ABSENT): stopped, (W.OFF, S.EXITED): forget, (W.OFF, S.CREATED): kill, (W.OFF, S.RUNNING): ask_off,
    (W.CYCLE, S.CREATED): kill, (W.CYCLE, S.RUNNING): ask_off,
    (W.RUN, S.ABSENT): begin, (W.RUN, S.EXITED): ended, (W.RUN, S.CREATED): run_it, (W.RUN, S.RUNNING): running,
    (W.HOLD, S.ABSENT): begin, (W.HOLD, S.EXITED): ended, (W.HOLD, S.CREATED): paused, (W.HOLD, S.RUNNING): pause,
    (W.GONE, S.STALLED): kill, (W.OFF, S.STALLED): stalled_to_stop, (W.CYCLE, S.STALLED): stalled_to_stop,
    (W.RUN, S.STALLED): stalled, (W.HOLD, S.STALLED): paused,
    # wanted     paused                     shutdown                   panicked              unresponsive
    (W.GONE, S.PAUSED): kill, (W.GONE, S.SHUTDOWN): kill, (W.GONE, S.PANICKED): kill, (W.GONE, S.UNRESPONSIVE): kill,
    (W.OFF, S.PAUSED): wake_to_stop, (W.OFF, S.SHUTDOWN): ending, (W.OFF, S.PANICKED): kill,
    (W.OFF, S.UNRESPONSIVE): silent_to_stop,
    (W.CYCLE, S.PAUSED): wake_to_stop, (W.CYCLE, S.SHUTDOWN): ending, (W.CYCLE, S.PANICKED): kill,
    (W.CYCLE, S.UNRESPONSIVE): silent_to_stop,
    (W.RUN, S.PAUSED): wake, (W.RUN, S.SHUTDOWN): went_off, (W.RUN, S.PANICKED): panicked,
    (W.RUN, S.UNRESPONSIVE): silent,
    (W.HOLD, S.PAUSED): paused, (W.HOLD, S.SHUTDOWN): went_off, (W.HOLD, S.PANICKED): panicked,
    (W.HOLD, S.UNRESPONSIVE): silent,
}  # fmt: skip
