"""The table of decisions: what is wanted × what the hypervisor says → a rule. Every pair that can be has a row."""

from __future__ import annotations

from corral.agent.reconcile.decision import Decision, Do, Rule, Wish
from corral.agent.reconcile.down import (
    ask_off,
    ending,
    forget,
    kill,
    silent_to_stop,
    stalled_to_stop,
    stopped,
    teardown,
    wake_to_stop,
)
from corral.agent.reconcile.seen import OFF_STATES, Seen
from corral.agent.reconcile.up import (
    begin,
    ended,
    panicked,
    pause,
    paused,
    run_it,
    running,
    silent,
    stalled,
    wake,
    went_off,
)
from corral.agent.settings import Settings
from corral.engine.protocol import State
from corral.model import Phase, Power, Vm


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
