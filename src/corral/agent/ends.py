"""What follows when a VM ends unasked, or cannot be started: it is counted, named, and the restart policy has its say.

Written down before anything of it is removed, so that it is counted once and never lost. What befell the VM is judged
before (:mod:`corral.agent.failure`); when it starts again follows from :mod:`corral.scheduler.restart`.
"""

from __future__ import annotations

from typing import Any

from corral.agent.failure import TABLE, Cause, Policy
from corral.agent.progress import TaskBook
from corral.agent.reconcile import Decision, Seen
from corral.agent.records import VmRecords
from corral.agent.settings import Settings
from corral.errors import CorralError, Refused, to_problem
from corral.model import Phase, Power, Vm
from corral.runtime import Runtime
from corral.scheduler.restart import Follow, after_end
from corral.units import format_duration

OFF_FIELDS: dict[str, Any] = {"pid": None, "memory": None, "started_at": None, "addresses": (), "guest": ""}
"""What the status says of a VM that has no process."""


class Ends:
    """Writes down the ends of one host's VMs."""

    def __init__(self, rt: Runtime, settings: Settings, *, book: TaskBook, records: VmRecords) -> None:
        self._rt, self._settings, self._book, self._records = rt, settings, book, records

    async def unasked(self, vm: Vm, seen: Seen, decision: Decision) -> Vm:
        """It ended unasked: before its trace is removed."""
        written = await self._follow(vm, decision.reason, Cause(decision.cause), ran_s=self._ran(vm, seen))
        await self._rt.faults.at("end.recorded")
        return written

    async def failed(self, vm: Vm, error: CorralError) -> Vm:
        """It could not be started: given up at once where repeating cannot help, else by the restart policy."""
        details = {**vm.status.details, "problem": to_problem(error)}
        if isinstance(error, Refused):
            reason = error.message + (f" ({error.hint})" if error.hint else "")
            return await self._records.write(
                vm, phase=Phase.ERROR, reason=reason, cause=Cause.START_FAILED, details=details,
                observed=vm.meta.generation, **OFF_FIELDS,
            )  # fmt: skip
        return await self._follow(vm, error.message, Cause.START_FAILED, ran_s=None, details=details)

    async def _follow(self, vm: Vm, why: str, cause: Cause, *, ran_s: float | None, **also: Any) -> Vm:
        policy, patience = TABLE[cause].policy, self._settings.patience
        outcome = after_end(
            vm.spec.restart, clean=policy is Policy.STOP, blameless=policy is Policy.AT_ONCE,
            failures=vm.status.failures, ran_s=ran_s, patience=patience,
        )  # fmt: skip
        fields: dict[str, Any] = {
            **OFF_FIELDS, "cause": cause, "failures": outcome.failures, "observed": vm.meta.generation, **also,
        }  # fmt: skip
        if outcome.follow is Follow.STOPPED:
            fields |= {"phase": Phase.STOPPED, "reason": why, "retry_at": None}
            written = await self._records.write(vm, power=Power.STOPPED, **fields)
            await self._book.fail(vm.meta.id, CorralError(why), but=("stop", "delete"))
            return written
        if outcome.follow is Follow.ERROR:
            poison = outcome.failures >= patience.poison
            often = f"; {patience.poison} failures in a row, start it to try again" if poison else ""
            fields |= {"phase": Phase.ERROR, "reason": why + often, "retry_at": None}
            return await self._records.write(vm, **fields)
        fields |= {
            "phase": Phase.PENDING,
            "reason": f"{why}; starts again {_after(outcome.delay_s)}",
            "retry_at": self._rt.clock.now() + outcome.delay_s,
        }
        return await self._records.write(vm, **fields)

    def _ran(self, vm: Vm, seen: Seen) -> float | None:
        if seen.running_s is not None:
            return seen.running_s
        # Adopted: only the record knows. A wall clock that jumped makes this wrong by the jump, once.
        return None if vm.status.started_at is None else max(0.0, self._rt.clock.now() - vm.status.started_at)


def _after(delay_s: float) -> str:
    return f"{format_duration(delay_s)} after that" if delay_s else "at once"
