"""Rules for a VM that is to be off, or gone: the guest is asked, its power is cut only when a person says so."""

from __future__ import annotations

from corral.agent.failure import Cause
from corral.agent.reconcile.decision import Decision, Do, kept
from corral.agent.reconcile.seen import Seen
from corral.agent.settings import Settings
from corral.model import Phase, Vm
from corral.units import format_duration


def kill(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    reason = "being deleted" if vm.meta.deleted is not None else "the power is being cut"
    return Decision(Do.KILL, Phase.STOPPING, reason)


def teardown(_vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return Decision(Do.TEARDOWN, Phase.STOPPING, "being deleted")


def stopped(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """It is off and is to be off. Why it went off stays readable until the owner asks for something else."""
    told = vm.status.phase is Phase.STOPPED and vm.status.observed == vm.meta.generation
    return kept(vm, Do.REST) if told else Decision(Do.REST, Phase.STOPPED)


def forget(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return _told(vm, Do.FORGET, "stopping")


def _told(vm: Vm, do: Do, otherwise: str, again: float | None = None) -> Decision:
    """What was written about an end that nobody asked for stays; else it is a stop under way."""
    status = vm.status
    if status.observed == vm.meta.generation and status.phase in (Phase.STOPPED, Phase.PENDING, Phase.ERROR):
        return kept(vm, do, again)
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
