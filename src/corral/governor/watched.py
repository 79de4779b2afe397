"""What the governor looks at and touches: its hands on the host, and each VM between two steps."""

from __future__ import annotations

from typing import Protocol

from corral.governor.entitle import Grant
from corral.governor.meter import Times
from corral.governor.protocol import VmPlan


class Hands(Protocol):
    """What the governor touches on its host. CPUs are indices from 0."""

    def now(self) -> float: ...
    def busy_s(self) -> float:
        """CPU seconds that this process has used."""
        ...

    def idle_s(self) -> float: ...
    def used_s(self, id: str) -> float: ...
    def throttled_s(self, id: str) -> float: ...
    def times(self, id: str) -> list[Times]:
        """Of each vCPU thread."""
        ...

    def runnable(self, id: str, thread: int) -> bool:
        """A vCPU thread (by its number) runs or waits to run at this moment."""
        ...

    def pin(self, id: str, thread: int, cpu: int | None) -> None:
        """Bind a vCPU thread (by its number) to a CPU, or let it run anywhere."""
        ...

    def weight(self, id: str, cores: float) -> None: ...
    def cap(self, id: str, cores: float | None) -> None: ...
    def guard(self, weights: dict[str, float]) -> bool:
        """Should this process die or fall silent, these VMs get these weights, and their threads run anywhere. False:
        nobody would do it. Holds for :data:`~corral.governor.guardian.SILENT_S`, or until :meth:`relieve`."""
        ...

    def relieve(self) -> None: ...


class Watched:
    """A VM as the governor sees it, between two steps."""

    def __init__(self, plan: VmPlan, used: float, times: list[Times], throttled: float) -> None:
        self.plan = plan
        self.used, self.times, self.throttled = used, times, throttled
        self.core = [-1] * len(times)
        self.waits = False
        """Others own the cores right now: it weighs next to nothing."""
        self.hungry = [False] * len(times)
        self.busy = [0.0] * len(times)
        """Part of the time since the last step in which each thread ran or had waited to."""
        self.unlike = [0.0] * len(times)
        """For how long each thread has done the contrary of what it is taken for, seconds."""
        self.demand = 0.0
        self.credit = 0.0
        """Deficit: what it was entitled to and did not get, seconds."""
        self.saved = min(plan.saved, plan.burst)
        """CPU-seconds that it saved up below its limit."""
        self.cap = float(len(times))
        """Cores that it can have at most right now; its CPUs: no cap."""
        self.trim = 0.0
        """Part by which its quota should be higher than its cap, so that it has what its cap says."""
        self.quota = 0.0
        """Cores: what it was given last, with a cap below its CPUs."""
        self.held_back = False
        """It had far more than its share, and has a quota until that is made up for."""
        self.grant = Grant(0.0, 0.0)
        self.decided = (used, times, throttled)
        """The counters at the last decision."""
        self.reported = (used, sum(t.wait for t in times), throttled)
        self.entitled_s = 0.0
