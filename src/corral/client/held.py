"""What the holder of an ephemeral VM knows about it: shared by both clients, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from corral.client.record import Batch, Record, task_error, vm_spec
from corral.errors import CorralError, NotFound, Refused, TimedOut, Unavailable
from corral.units import MIB, parse_size

RECONNECT_S = 30.0
"""How long a holder looks for a daemon that went away: for as long as its holds last (``store/holds.py``)."""
CUT_S = 1.0
"""How long a program of a VM that is over may go on printing what is still on its way."""
LAST_WORDS_S = 3.0
"""How long to wait for the reason after a guest fell silent: its host has to see it first."""
MAX_OUTPUT = 64 * MIB
"""What a program may print, if nothing else is said: more than anybody reads, less than fills memory or a disk."""
MAX_PROCESSES = 1024
"""Processes and threads that a program may have at once, if nothing else is said: enough for a build, and a bomb of so
many neither fills a small VM's memory nor keeps its agent from answering."""
OVER = ("stopped", "error")
"""Phases of a VM that will not run again by itself."""


class Held:
    """A VM as its holder sees it. Fed with the batches of the hold stream."""

    def __init__(self, vm: Record, launch: Record) -> None:
        self.vm, self.launch = vm, launch
        self.deleted = False

    def take(self, batch: Batch) -> bool:
        """What a batch changes; whether anything of this VM did."""
        news = False
        for change in batch.changes:
            obj = change["object"]
            if change["id"] == self.vm.id:
                self.deleted = obj is None
                self.vm = Record(obj) if obj is not None else self.vm
                news = True
            elif change["id"] == self.launch.id and obj is not None:
                self.launch = Record(obj)
                news = True
        return news

    @property
    def answers(self) -> bool:
        """Its guest answered: programs can be run."""
        return self.vm.phase == "running" and not self.deleted

    def failure(self) -> CorralError | None:
        """Why it does not run and will not; None while it may."""
        if self.deleted or self.vm.meta.get("deleted") is not None:
            return NotFound(f"{self.vm.name} was deleted", hint=f"corral event list tells by whom: {self.vm.name}")
        if self.launch.phase in ("failed", "cancelled"):
            return task_error(self.launch)
        if self.vm.phase in OVER:
            problem: Any = self.vm.status.get("details", {}).get("problem") or {}
            return CorralError(
                f"{self.vm.name} is over: {self.vm.status.get('reason') or self.vm.phase}",
                hint=str(problem.get("hint") or ""),
            )
        return None

    def late(self, timeout: float) -> TimedOut:
        """The error for a guest that has not answered yet; names what it waits for."""
        reason = self.vm.status.get("reason") or f"it is {self.vm.phase}"
        return TimedOut(f"{self.vm.name} did not answer within {timeout:g} s: {reason}")

    def silence(self) -> CorralError | None:
        """Why nobody answers in it although it is not over; None if somebody should."""
        if self.vm.phase != "unresponsive":
            return None
        reason = self.vm.status.get("reason") or "its guest hangs"
        return Unavailable(f"{self.vm.name} does not answer: {reason}", code="unresponsive")


def sandbox_spec(
    image: str, *, net: str = "none", ephemeral: bool = True, cpus: int | None = None, memory: int | str | None = None,
    disk: int | str | None = None, flavor: str | None = None, spec: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The spec of a throw-away VM: never started again, deleted with its holder, without a network unless asked for.

    ``net``: ``none``, or the name of a network (``user`` reaches everything that this machine reaches).
    """
    wanted = {"restart": "never", **(spec or {}), "ephemeral": ephemeral}
    wanted.setdefault("nics", [] if net == "none" else [{"network": net}])
    return vm_spec(image, cpus=cpus, memory=memory, disk=disk, flavor=flavor, spec=wanted)


class Limits(NamedTuple):
    """What each program in a sandbox may take, unless it is told otherwise; None: as much as there is."""

    max_output: int | None = MAX_OUTPUT
    """Bytes of stdout and stderr together."""
    processes: int | None = MAX_PROCESSES
    """Processes and threads at once, all its descendants included."""


def limits_of(
    limits: Limits, max_output: int | str | None, processes: int | None, guest: str
) -> tuple[int | None, int | None]:
    """What one program may take. ``""`` and 0 mean the sandbox's limit, which a guest without corral-guest cannot keep
    for processes: there it means none."""
    most = limits.max_output if max_output == "" else None if max_output is None else parse_size(max_output)
    usual = limits.processes if guest == "corral-guest" else None
    return most, usual if processes == 0 else processes


def refuse_entry(name: str, why: str) -> None:
    """For copies that are whole or an error."""
    raise Refused(f"{name} cannot be copied: {why}", code="invalid")
