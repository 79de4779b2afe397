"""The one object through which code reaches time, randomness and fault points."""

from __future__ import annotations

from dataclasses import dataclass, field

from corral.runtime.clock import Clock, SystemClock
from corral.runtime.faults import FaultPoints, NoFaults
from corral.runtime.random import Random, SystemRandom


@dataclass(frozen=True, slots=True)
class Runtime:
    """Injected everywhere. ``Runtime()`` is the real world; :mod:`corral.sim` makes the simulated one."""

    clock: Clock = field(default_factory=SystemClock)
    random: Random = field(default_factory=SystemRandom)
    faults: FaultPoints = field(default_factory=NoFaults)
