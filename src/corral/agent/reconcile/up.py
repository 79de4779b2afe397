"""Rules for a VM that is to run, or to be held: it is started, watched, and ended only for what its owner lets us."""

from __future__ import annotations

from corral.agent.failure import CUT, PANIC, Cause, end_of
from corral.agent.reconcile.decision import Decision, Do, kept
from corral.agent.reconcile.down import ending
from corral.agent.reconcile.seen import Seen
from corral.agent.settings import Settings
from corral.model import OnHang, Phase, Restart, Vm
from corral.units import format_duration

LIVED = (Phase.RUNNING, Phase.PAUSED, Phase.UNRESPONSIVE, Phase.UNKNOWN)
"""Phases in which a process was there: if it is gone now, it ended without being asked to."""


def begin(vm: Vm, seen: Seen, now: float, s: Settings) -> Decision:
    """No process and no trace of one. Start it, unless it ended unasked, is given up, or has to wait."""
    status = vm.status
    fresh_wish = status.observed != vm.meta.generation
    if status.phase in LIVED and vm.spec.boots <= status.boots:
        text = "its QEMU is gone without a trace (was the host restarted?)"
        return Decision(Do.END, status.phase, text, cause=Cause.QEMU_GONE)
    if status.phase is Phase.ERROR and not fresh_wish:
        return kept(vm, Do.REST)
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
        return kept(vm, Do.FORGET)
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
        return kept(vm, Do.KILL)
    if vm.spec.resets > vm.status.resets:
        return Decision(Do.RESET, Phase.STARTING, "reset")
    guest, phase, up = seen.guest, vm.status.phase, seen.running_s or 0.0
    if (left := _going_off(vm, seen, s)) > 0:
        text = "the guest was asked to power off before; it is started again when it has"
        return Decision(Do.REST, Phase.STOPPING, text, again=left)
    if phase is Phase.UNRESPONSIVE and vm.status.cause == Cause.DISK_FULL and up < s.stall_settle_s:
        return kept(vm, Do.REST, again=s.stall_settle_s - up)
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
    return kept(vm, Do.REST, sure=False)


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
        return kept(vm, Do.REST, again=again)
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
    return kept(vm, Do.KILL)


def silent(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """QEMU lives and does not answer: wait long, it may come back; never a kill on a guess."""
    if _given_up(vm):
        return kept(vm, Do.KILL)
    if seen.silent_s is None:
        return kept(vm, Do.REST, s.heartbeat_s, sure=False)
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
