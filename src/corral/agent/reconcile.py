"""Decides what to do next about one VM. Pure: (record, what is seen, now) → one decision, no I/O, no clock.

Level-triggered: nothing here remembers what was done before. A decision does one thing, the world is looked at again,
and the next one follows, until it says REST. The rows of :data:`TABLE` are (what is wanted, what the hypervisor says)
→ a rule; each rule reads as a sentence. :mod:`corral.agent.steps` does what is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from corral.agent.settings import Settings
from corral.engine.protocol import Exit, State
from corral.model import Phase, Power, Vm
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
    """What is known of the agent inside. ``booting``: this boot has not answered yet and may take its time."""

    expected: bool = False
    answered: bool = False
    booting: bool = False
    hung: bool = False
    silent_s: float = 0.0
    trouble: str = ""
    """Why a fork's guest is not somebody of its own yet."""


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
    """Since it stood still with an I/O error or a full disk."""
    silent: bool = False
    """The hypervisor did not answer several times in a row."""


class Decision(NamedTuple):
    """What to do, what to write down first, and when to look again (seconds; None: when something changes)."""

    do: Do
    phase: Phase
    reason: str = ""
    again: float | None = None
    sure: bool = True
    """False: the phase is only what was known before; it does not answer a new wish (``status.observed`` stays)."""


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
    return Decision(Do.REST, Phase.STOPPED, vm.status.reason if told else "")


def forget(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return Decision(Do.FORGET, *_told(vm, "stopping"))


def _told(vm: Vm, otherwise: str) -> tuple[Phase, str]:
    """What was written about an end that nobody asked for stays; else it is a stop under way."""
    status = vm.status
    if status.observed == vm.meta.generation and status.phase in (Phase.STOPPED, Phase.PENDING, Phase.ERROR):
        return status.phase, status.reason
    return Phase.STOPPING, otherwise


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


def wake_to_stop(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """A paused guest cannot power itself off: let it run first."""
    if vm.spec.force:
        return Decision(Do.KILL, Phase.STOPPING, "the power is being cut")
    return Decision(Do.RESUME, Phase.STOPPING, "the guest is asked to power off")


def ending(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """The guest is off, its process is about to end."""
    phase, reason = _told(vm, "the guest is off, its process ends")
    waited = seen.ending_s or 0.0
    if waited >= s.ending_s:
        return Decision(Do.KILL, phase, reason)
    return Decision(Do.REST, phase, reason, again=max(0.1, s.ending_s - waited))


def silent_to_stop(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    if vm.spec.force:
        return Decision(Do.KILL, Phase.STOPPING, "the power is being cut")
    if not seen.silent:
        return Decision(Do.REST, Phase.STOPPING, "the guest is asked to power off", again=s.heartbeat_s)
    return Decision(Do.REST, Phase.UNRESPONSIVE, "QEMU does not answer; --force cuts the power", again=s.heartbeat_s)


def begin(vm: Vm, seen: Seen, now: float, s: Settings) -> Decision:
    """No process and no trace of one. Start it, unless it ended unasked, is given up, or has to wait."""
    status = vm.status
    fresh_wish = status.observed != vm.meta.generation
    if status.phase in LIVED and vm.spec.boots <= status.boots:
        return Decision(Do.END, status.phase, "its QEMU is gone without a trace (was the host restarted?)")
    if status.phase is Phase.ERROR and not fresh_wish:
        return Decision(Do.REST, Phase.ERROR, status.reason)
    if status.retry_at is not None and not fresh_wish and now < status.retry_at:
        # A wall clock that was set back must not keep a VM down for longer than the backoff ever asks for.
        return Decision(Do.REST, Phase.PENDING, status.reason, again=min(status.retry_at - now, 300.0))
    if seen.gate.error:
        return Decision(Do.REST, Phase.ERROR, seen.gate.reason)
    if seen.gate.reason:
        return Decision(Do.REST, Phase.PENDING, seen.gate.reason, again=seen.gate.again_s)
    return Decision(Do.START, Phase.STARTING)


def ended(vm: Vm, seen: Seen, _now: float, _s: Settings) -> Decision:
    """A trace of a process that ended. Was it ours to end?"""
    status = vm.status
    if vm.spec.boots > status.boots or status.phase is Phase.STOPPING:
        return Decision(Do.FORGET, Phase.STOPPING, "restarting")
    if status.phase not in (*LIVED, Phase.STARTING):
        return Decision(Do.FORGET, status.phase, status.reason)
    if seen.asked_s is not None:
        return Decision(Do.FORGET, Phase.STOPPING, "stopped, and wanted again")
    return Decision(Do.END, status.phase, _why(seen.exit))


def _why(end: Exit | None) -> str:
    """An end in words."""
    if end is None:
        return "its QEMU ended"
    if end.reason in ("guest-shutdown", "guest-reset"):
        return "the guest powered off"
    if end.reason == "guest-panic":
        return "the guest's kernel panicked"
    how = f"signal {end.signal}" if end.signal else f"status {end.code}" if end.code is not None else end.reason
    words = end.last_words.strip().splitlines()
    return f"its QEMU ended ({how or 'unknown how'})" + (f": {words[-1][:300]}" if words else "")


def run_it(_vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    return Decision(Do.RESUME, Phase.STARTING)


def wake(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """Paused and wanted running. If it stands still by itself (disk full), trying at once again would only burn CPU."""
    if seen.stalled_s is not None and seen.stalled_s < s.stall_retry_s:
        text = "stands still after a disk error on the host (full?); tried again every 10 s"
        return Decision(Do.REST, Phase.UNRESPONSIVE, text, again=s.stall_retry_s - seen.stalled_s)
    return Decision(Do.RESUME, vm.status.phase if vm.status.phase is Phase.STARTING else Phase.PAUSED)


def running(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """Its CPUs run. It counts as running when its agent answers (or none is expected)."""
    if vm.spec.resets > vm.status.resets:
        return Decision(Do.RESET, Phase.STARTING, "reset")
    guest, phase = seen.guest, vm.status.phase
    if not guest.expected or (guest.answered and not guest.hung):
        return Decision(Do.REST, Phase.RUNNING)
    if guest.hung:
        text = f"the guest has not answered for {format_duration(guest.silent_s)}"
        # The figure grows with each look; what was written first is enough to know since when.
        return Decision(Do.REST, Phase.UNRESPONSIVE, vm.status.reason if phase is Phase.UNRESPONSIVE else text)
    if guest.booting or phase not in (Phase.RUNNING, Phase.UNRESPONSIVE):
        up = seen.running_s or 0.0
        if up >= s.boot_patience_s:
            text = f"the guest's agent has not answered {format_duration(s.boot_patience_s)} after the start"
            return Decision(Do.REST, Phase.UNRESPONSIVE, text)
        text = (
            f"the guest has no identity of its own yet: {guest.trouble}"
            if guest.trouble
            else "waits for the guest to answer"
        )
        return Decision(Do.REST, Phase.STARTING, text, again=s.boot_patience_s - up)
    # Adopted: what was known holds until the guest is heard of.
    return Decision(Do.REST, phase, vm.status.reason, sure=False)


def went_off(vm: Vm, seen: Seen, now: float, s: Settings) -> Decision:
    """The guest powered itself off; nobody had asked, unless we had."""
    if vm.status.phase in (*LIVED, Phase.STARTING) and seen.asked_s is None:
        return Decision(Do.END, vm.status.phase, "the guest powered off")
    return ending(vm, seen, now, s)


def panicked(vm: Vm, _seen: Seen, _now: float, _s: Settings) -> Decision:
    """Write the end down before the process is killed: afterwards nobody could tell why it ended."""
    if vm.status.phase in (*LIVED, Phase.STARTING):
        return Decision(Do.END, vm.status.phase, "the guest's kernel panicked")
    return Decision(Do.KILL, vm.status.phase, vm.status.reason)


def silent(vm: Vm, seen: Seen, _now: float, s: Settings) -> Decision:
    """QEMU lives and does not answer: wait, it may come back; never a kill on a guess."""
    if seen.silent:
        return Decision(Do.REST, Phase.UNRESPONSIVE, "QEMU does not answer", again=s.heartbeat_s)
    return Decision(Do.REST, vm.status.phase, vm.status.reason, again=s.heartbeat_s, sure=False)


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
