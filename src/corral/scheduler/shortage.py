"""When a VM has been short of CPU time for so long that somebody should know, and when that is over.

The timed form of suspicion (:mod:`corral.scheduler.suspicion`), F(t) = F(t-1) + 1/L: a level rises by Δt / BEGIN_S
while the VM is short, and falls by Δt / END_S while it is not. It is told at 1 and over at 0, and in between nothing is
said: a VM at the edge makes one event, not one a second.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

BEGIN_S = 30.0
"""Short for so long without a break: told. What is shorter is everyday life of a shared host."""
END_S = 60.0
"""Not short for so long without a break: over."""
HELD = 0.2
"""Part of the time it wanted in which its limit held it."""
STARVED = 0.5
"""Part of what it should have had; less is starving."""
TRIFLE = 0.05
"""Cores. Nobody is bothered with less than this, whatever part of a small wish it is."""


class Kind(StrEnum):
    """What a VM can be short by; the value is the reason of the event that tells it."""

    THROTTLED = "CpuThrottled"
    STARVED = "CpuStarved"


RESTORED = "CpuRestored"


class Look(NamedTuple):
    """One VM over ``since_s`` seconds, in cores. ``due``: what it should have had (:func:`due`)."""

    since_s: float
    due: float
    used: float
    wait: float
    throttled: float

    def short(self) -> Kind | None:
        """Its limit comes first: a VM that is held has what it is entitled to."""
        if self.throttled >= TRIFLE and self.throttled >= HELD * (self.used + self.throttled):
            return Kind.THROTTLED
        waits = self.wait - self.throttled  # the kernel counts time that a limit holds a thread as waiting, too
        if waits >= TRIFLE and self.due - self.used >= TRIFLE and self.used < STARVED * self.due:
            return Kind.STARVED
        return None


class Sum(NamedTuple):
    """Seconds and core-seconds since the VM began to be short."""

    seconds: float = 0.0
    due: float = 0.0
    used: float = 0.0
    throttled: float = 0.0

    def plus(self, look: Look) -> Sum:
        return Sum(
            self.seconds + look.since_s, self.due + look.due * look.since_s, self.used + look.used * look.since_s,
            self.throttled + look.throttled * look.since_s,
        )  # fmt: skip


class Change(NamedTuple):
    """What is to be told: ``kind`` has begun, or is over. ``sum``: from the beginning until now."""

    kind: Kind
    over: bool
    sum: Sum

    @property
    def reason(self) -> str:
        return RESTORED if self.over else self.kind.value

    def sentence(self) -> str:
        """In words, with numbers."""
        if self.over:
            return "its limit holds it back no longer" if self.kind is Kind.THROTTLED else "it has its CPU time again"
        seconds = max(self.sum.seconds, 1e-9)
        due, used, held = self.sum.due / seconds, self.sum.used / seconds, self.sum.throttled / seconds
        if self.kind is Kind.THROTTLED:
            part = held / max(used + held, 1e-9)
            return f"its limit held it for {part:.0%} of the last {seconds:.0f} s in which it wanted to run"
        return f"it used {used:.2f} cores of the {due:.2f} it should have had, for {seconds:.0f} s, and waited for more"


class Level(NamedTuple):
    """How far one kind of shortage has gone, 0 to 1."""

    level: float = 0.0
    told: bool = False
    sum: Sum = Sum()

    def after(self, kind: Kind, look: Look) -> tuple[Level, Change | None]:
        short = look.short() is kind
        level = self.level + look.since_s / BEGIN_S if short else self.level - look.since_s / END_S
        level = min(1.0, max(0.0, level))
        sum_ = self.sum.plus(look) if short or self.level > 0 else Sum()
        if level >= 1.0 - 1e-9 and not self.told:
            return Level(level, True, sum_), Change(kind, False, sum_)
        if level <= 1e-9:
            over = Change(kind, True, sum_) if self.told else None
            return Level(), over
        return Level(level, self.told, sum_), None


class Shortage(NamedTuple):
    """All that is remembered of one VM."""

    throttled: Level = Level()
    starved: Level = Level()

    def after(self, look: Look) -> tuple[Shortage, tuple[Change, ...]]:
        """After one more look; what is to be told now."""
        throttled, first = self.throttled.after(Kind.THROTTLED, look)
        starved, second = self.starved.after(Kind.STARVED, look)
        return Shortage(throttled, starved), tuple(change for change in (first, second) if change is not None)


def due(entitled: float, wanted: float, cores: float, foreign: float) -> float:
    """What a VM should have had, in cores: its entitlement, as if no other programs took part of the host.

    Entitlements divide what the host has for VMs. That other programs take much of it is what starves VMs most often,
    so it may not count as fair. ``wanted``: what it may and would use, never more than its limit.
    """
    left = max(cores - foreign, 0.05 * cores)
    return max(entitled, min(wanted, entitled * cores / left))
