"""The world as code sees it: time, randomness, ids, deadlines, fault points, supervised tasks, keyed queue, log.

Everything that is not a pure function takes a :class:`Runtime` and asks it, never the standard library, for time,
randomness and ids. That is what lets the simulator run the same code under virtual time, exactly repeatable.
May not know what a VM is. Start reading at :mod:`corral.runtime.runtime`.
"""

from corral.runtime.clock import Clock, SystemClock
from corral.runtime.deadline import deadline
from corral.runtime.faults import FaultPoints, KillAt, NoFaults
from corral.runtime.queue import KeyedQueue
from corral.runtime.random import Random, SeededRandom, SystemRandom
from corral.runtime.runtime import Runtime
from corral.runtime.supervisor import Supervisor

__all__ = [
    "Clock", "FaultPoints", "KeyedQueue", "KillAt", "NoFaults", "Random", "Runtime", "SeededRandom", "Supervisor",
    "SystemClock", "SystemRandom", "deadline",
]  # fmt: skip
