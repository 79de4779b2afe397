"""What follows when a VM ends without being asked to: again after a while, stopped, or given up loudly.

Backoff 10 s·2ⁿ up to 300 s, forgotten after ten healthy minutes. Three failures in a row make a VM poison: it stays in
``error`` until a person starts it, so that one bad guest cannot keep a host busy with booting.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from corral.model import Restart


class Patience(NamedTuple):
    """How long, how often."""

    first_s: float = 10.0
    longest_s: float = 300.0
    healthy_s: float = 600.0
    """A VM that ran this long has shown that it can: its earlier failures no longer count."""
    poison: int = 3
    """Failures in a row after which it is given up."""


USUAL = Patience()
POISON = USUAL.poison


class Follow(StrEnum):
    """What follows."""

    AGAIN = "again"
    STOPPED = "stopped"
    ERROR = "error"


class Outcome(NamedTuple):
    """``failures`` in a row, this end included; ``delay_s`` until the next start, for ``again``."""

    follow: Follow
    failures: int
    delay_s: float = 0.0


def backoff(failures: int, patience: Patience = USUAL) -> float:
    """Seconds to wait after so many failures in a row (1 or more)."""
    return min(patience.longest_s, patience.first_s * 2.0 ** min(failures - 1, 16))


def after_end(
    policy: Restart, *, clean: bool, failures: int, ran_s: float | None, blameless: bool = False,
    patience: Patience = USUAL,
) -> Outcome:  # fmt: skip
    """What follows an end that nobody asked for.

    Args:
        clean: the guest powered itself off.
        failures: before this end.
        ran_s: how long it ran, if known.
        blameless: its host failed, not the VM: it is started again at once, and nothing is counted.
    """
    before = 0 if ran_s is not None and ran_s >= patience.healthy_s else failures
    if clean:
        if policy is not Restart.ALWAYS:
            return Outcome(Follow.STOPPED, 0)
        return Outcome(Follow.AGAIN, before + 1, backoff(before + 1, patience))
    if policy is Restart.NEVER:
        return Outcome(Follow.ERROR, before + 1)
    if blameless:
        return Outcome(Follow.AGAIN, before)
    count = before + 1
    if count >= patience.poison:
        return Outcome(Follow.ERROR, count)
    return Outcome(Follow.AGAIN, count, backoff(count, patience))
