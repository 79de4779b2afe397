"""What follows when a VM ends without being asked to: again after a while, stopped, or given up loudly.

Backoff 10 s·2ⁿ up to 300 s, forgotten after ten healthy minutes. Three failures in a row make a VM poison: it stays in
``error`` until a person starts it, so that one bad guest cannot keep a host busy with booting.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from corral.model import Restart

FIRST_DELAY_S = 10.0
LONGEST_DELAY_S = 300.0
HEALTHY_S = 600.0
"""A VM that ran this long has shown that it can: its earlier failures no longer count."""
POISON = 3


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


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row (1 or more)."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 1, 16))


def after_end(policy: Restart, *, clean: bool, failures: int, ran_s: float | None) -> Outcome:
    """``clean``: the guest powered itself off. ``failures``: before this end. ``ran_s``: how long it ran, if known."""
    before = 0 if ran_s is not None and ran_s >= HEALTHY_S else failures
    if clean:
        if policy is not Restart.ALWAYS:
            return Outcome(Follow.STOPPED, 0)
        return Outcome(Follow.AGAIN, before + 1, backoff(before + 1))
    count = before + 1
    if policy is Restart.NEVER or count >= POISON:
        return Outcome(Follow.ERROR, count)
    return Outcome(Follow.AGAIN, count, backoff(count))
