"""What a task's target says about the task: fulfilled, failed, superseded, too late, or still under way. Pure.

A task does nothing by itself: the agent reconciles the target, and the task ends when the target's status fulfils it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from corral.errors import CorralError, Refused, TimedOut, from_problem
from corral.model import Phase, Power, Step, Task, TaskState, TaskStatus, Vm

WANTS: dict[str, Power] = {
    "launch": Power.RUNNING,
    "fork": Power.RUNNING,
    "start": Power.RUNNING,
    "restart": Power.RUNNING,
    "reset": Power.RUNNING,
    "resume": Power.RUNNING,
    "pause": Power.PAUSED,
    "stop": Power.STOPPED,
}
FULFILLED: dict[Power, Phase] = {
    Power.RUNNING: Phase.RUNNING,
    Power.PAUSED: Phase.PAUSED,
    Power.STOPPED: Phase.STOPPED,
}
OTHER_WISH: dict[Power, str] = {Power.RUNNING: "start", Power.PAUSED: "pause", Power.STOPPED: "stop"}


class Verdict(NamedTuple):
    """How a task ends."""

    state: TaskState
    error: CorralError | None = None


def judge(task: Task, vm: Vm | None, now: float) -> Verdict | None:
    """The end of a task about a VM (None: the record is gone), or None while it goes on."""
    verb = task.spec.verb
    if vm is None:
        return Verdict(TaskState.DONE) if verb == "delete" else _cancelled("the VM was deleted")
    if verb != "delete":
        if vm.meta.deleted is not None:
            return _cancelled("superseded by delete")
        end = _fulfilled(task, vm)
        if end is not None:
            return end
    if task.spec.cancel and verb != "delete":
        return _cancelled("cancelled")
    if now >= task.meta.created + task.spec.deadline_s:
        return Verdict(TaskState.FAILED, too_late(task, vm.status.reason))
    return None


def _fulfilled(task: Task, vm: Vm) -> Verdict | None:
    spec, status = vm.spec, vm.status
    newer = vm.meta.generation > task.spec.generation
    if newer and spec.power is not WANTS.get(task.spec.verb, spec.power):
        return _cancelled(f"superseded by {OTHER_WISH[spec.power]}")
    if status.observed < task.spec.generation:
        return None
    # A silent hypervisor may keep a VM's phase while a boot or a reset that was asked for is still owed.
    owed = spec.power is not Power.STOPPED and (
        status.resets < spec.resets or (spec.power is Power.RUNNING and status.boots < spec.boots)
    )
    if status.phase is FULFILLED[spec.power] and not owed:
        return Verdict(TaskState.DONE)
    if status.phase is Phase.ERROR:
        problem = status.details.get("problem")
        told = from_problem(problem) if isinstance(problem, dict) else CorralError(status.reason or "it failed")
        return Verdict(TaskState.FAILED, told)
    return None


def _cancelled(why: str) -> Verdict:
    return Verdict(TaskState.CANCELLED, Refused(why, code="cancelled"))


def too_late(task: Task, reason: str = "") -> TimedOut:
    """The error of a task whose deadline passed: names the step that was waited for."""
    step = next((s for s in reversed(task.status.steps) if s.state is TaskState.RUNNING), None)
    waited = f"the step {step.name!r}" if step else "its turn"
    told = reason or (step.message if step else "")
    return TimedOut(
        f"{task.spec.verb} of {task.spec.target_name or task.spec.target_id} took longer than "
        f"{task.spec.deadline_s:g} s; it waited for {waited}" + (f" ({told})" if told else ""),
        hint="it goes on in the background; see its console log",
    )


def begun(status: TaskStatus, name: str, now: float, message: str = "") -> TaskStatus:
    """The status when a step begins: the one before it is done. The same step again only changes its message."""
    steps = list(status.steps)
    if steps and steps[-1].name == name and steps[-1].state is TaskState.RUNNING:
        steps[-1] = msgspec.structs.replace(steps[-1], message=message)
    else:
        steps = [_ended(step, TaskState.DONE, now) for step in steps]
        steps.append(Step(name=name, state=TaskState.RUNNING, started=now, message=message))
    return msgspec.structs.replace(
        status, state=TaskState.RUNNING, started=status.started or now, steps=tuple(steps[-MAX_STEPS:])
    )


MAX_STEPS = 32
"""A VM that fails and is started again adds steps; a task shows the last ones."""


def finished(
    status: TaskStatus, verdict: Verdict, now: float, problem: dict[str, Any] | None, result: dict[str, Any]
) -> TaskStatus:
    """The status when a task ends."""
    steps = tuple(_ended(step, verdict.state, now) for step in status.steps)
    return msgspec.structs.replace(
        status, state=verdict.state, ended=now, started=status.started or now, error=problem, steps=steps,
        progress=1.0 if verdict.state is TaskState.DONE else status.progress, result=result,
    )  # fmt: skip


def _ended(step: Step, state: TaskState, now: float) -> Step:
    return step if step.state.final else msgspec.structs.replace(step, state=state, ended=now)
