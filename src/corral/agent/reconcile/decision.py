"""What is decided about one VM: what its record asks for, what to do next, and what to write down first."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from corral.agent.reconcile.seen import Seen
from corral.agent.settings import Settings
from corral.model import Phase, Vm


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
"""Asked only in the rows of the table in which it stands."""


def kept(vm: Vm, do: Do, again: float | None = None, *, sure: bool = True) -> Decision:
    """Do something, and let what is written about the VM stand."""
    status = vm.status
    return Decision(do, status.phase, status.reason, again, sure, status.cause)
