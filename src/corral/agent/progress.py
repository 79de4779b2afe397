"""Tasks as the agent serves them: which are open for what, their steps, and their end.

Steps are told in memory and written behind, newest first to win: showing progress must not slow the work. Ends are
written before anything else goes on. Judging is pure, in :mod:`corral.agent.verdict`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from corral.agent.verdict import Verdict, begun, finished, judge, too_late
from corral.errors import CorralError, NotFound, Refused, to_problem
from corral.model import Resource, Task, TaskState, TaskStatus, Vm
from corral.runtime import Runtime
from corral.store.objects import Objects, Remove, Update, Write

log = structlog.get_logger("tasks")

SERIAL_TAIL = 2048
"""Bytes of the serial log that a failed task carries: about the last twenty lines."""


LONGEST_LOOK_S = 3600.0
"""What has no task is looked at again after this."""


class TaskBook:
    """The open tasks. Fed by the agent's watch with :meth:`put` and :meth:`drop`.

    Args:
        tail: the last bytes of a VM's serial log.
    """

    def __init__(self, objects: Objects, rt: Runtime, tail: Callable[[str, int], bytes]) -> None:
        self._objects, self._rt, self._tail = objects, rt, tail
        self._tasks: dict[str, Task] = {}
        self._by_target: dict[str, set[str]] = {}
        self._steps: dict[str, TaskStatus] = {}  # told, not yet written
        self._writers: dict[str, asyncio.Task[None]] = {}

    def put(self, task: Task) -> None:
        """A task as the store has it."""
        if task.status.state.final:
            self.drop(task.meta.id)
            return
        known = self._tasks.get(task.meta.id)
        if known is None or known.meta.revision < task.meta.revision:
            self._tasks[task.meta.id] = task
            self._by_target.setdefault(task.spec.target_id, set()).add(task.meta.id)

    def drop(self, id: str) -> None:
        task = self._tasks.pop(id, None)
        self._steps.pop(id, None)
        if task is not None:
            ids = self._by_target[task.spec.target_id]
            ids.discard(id)
            if not ids:
                del self._by_target[task.spec.target_id]

    def keep(self, ids: set[str]) -> None:
        """Only these tasks are open."""
        for id in set(self._tasks) - ids:
            self.drop(id)

    def all(self) -> list[Task]:
        return list(self._tasks.values())

    def of(self, target_id: str) -> list[Task]:
        """The open tasks about one thing, oldest first."""
        tasks = [self._tasks[id] for id in self._by_target.get(target_id, ())]
        return sorted(tasks, key=lambda t: (t.meta.created, t.meta.id))

    def step(self, target_id: str, name: str, message: str = "", *, progress: float | None = None) -> None:
        """The step ``name`` begins (or says something new) for every open task about this thing."""
        for task in self.of(target_id):
            before = self._steps.get(task.meta.id, task.status)
            status = begun(before, name, self._rt.clock.now(), message)
            if progress is not None:
                status = msgspec.structs.replace(status, progress=progress)
            if status != before:
                self._tell(task.meta.id, status)

    def _tell(self, id: str, status: TaskStatus) -> None:
        self._steps[id] = status
        if id not in self._writers:
            writer = asyncio.get_running_loop().create_task(self._write(id), name=f"task-steps-{id}")
            self._writers[id] = writer
            writer.add_done_callback(lambda _done: self._writers.pop(id, None))

    async def _write(self, id: str) -> None:
        while (status := self._steps.get(id)) is not None:
            try:
                task = await self._objects.change(Task, id, lambda now, s=status: _with_steps(now, s))  # type: ignore[misc]
            except NotFound:
                self.drop(id)
                return
            except CorralError as error:
                # Steps are for people who watch; the next one is written again, and the end does not depend on them.
                log.warning("steps of a task not written", task=id, error=error.message)
                return
            self.put(task)
            if self._steps.get(id) is status:
                del self._steps[id]

    async def settle(self, target_id: str, vm: Vm | None) -> float | None:
        """End the tasks that the VM's record fulfils, fails or leaves too late; seconds to the next deadline."""
        nearest: float | None = None
        for task in self.of(target_id):
            now = self._rt.clock.now()
            told = self._told(task)
            verdict = judge(told, vm, now)
            if verdict is not None:
                await self.finish(task, verdict)
                continue
            left = max(0.05, task.meta.created + task.spec.deadline_s - now)
            nearest = left if nearest is None else min(nearest, left)
        return nearest

    def due(self, target_id: str) -> tuple[float, Verdict | None]:
        """Seconds until the next deadline of the tasks about a thing; the end of all, if one is cancelled or late."""
        now, left = self._rt.clock.now(), LONGEST_LOOK_S
        for task in self.of(target_id):
            if task.spec.cancel:
                return 0.0, Verdict(TaskState.CANCELLED, Refused("cancelled", code="cancelled"))
            due = task.meta.created + task.spec.deadline_s - now
            if due <= 0:
                return 0.0, Verdict(TaskState.FAILED, too_late(task))
            left = min(left, due)
        return left, None

    async def finish(self, task: Task, verdict: Verdict, result: dict[str, Any] | None = None) -> None:
        """Write the end of a task; one that has ended already stays as it is."""
        steps = self._told(task).status.steps
        problem = self._problem(task, verdict)

        def end(current: Task) -> Task | None:
            if current.status.state.final:
                return None
            status = msgspec.structs.replace(current.status, steps=steps)
            return msgspec.structs.replace(
                current, status=finished(status, verdict, self._rt.clock.now(), problem, result or {})
            )

        try:
            await self._objects.change(Task, task.meta.id, end)
        except NotFound:
            log.debug("a task was collected before it ended", task=task.meta.id)
        self.drop(task.meta.id)

    async def fail(self, target_id: str, error: CorralError, *, but: tuple[str, ...] = ()) -> None:
        """End every open task about this thing (except these verbs) with an error."""
        for task in self.of(target_id):
            if task.spec.verb not in but:
                await self.finish(task, Verdict(TaskState.FAILED, error))

    async def finish_with(self, target_id: str, removed: Remove, also: list[Write]) -> None:
        """Remove a target's record and end its tasks (delete: done; others: cancelled), all in one transaction."""
        writes: list[Write] = [removed, *also]
        tasks = self.of(target_id)
        for task in tasks:
            current = await self._objects.get(Task, task.meta.id)
            verdict = judge(task, None, self._rt.clock.now())
            if verdict is None or current.status.state.final:
                continue
            status = msgspec.structs.replace(current.status, steps=self._told(task).status.steps)
            problem = self._problem(task, verdict)
            status = finished(status, verdict, self._rt.clock.now(), problem, {})
            writes.append(Update(msgspec.structs.replace(current, status=status)))
        await self._objects.commit(writes)
        for task in tasks:
            self.drop(task.meta.id)

    async def remove(self, cls: type[Resource], id: str) -> bool:
        """Remove the record of what was asked to go, as :meth:`finish_with`. False: it has changed, look again."""
        try:
            await self.finish_with(id, Remove(await self._objects.get(cls, id)), [])
        except NotFound:
            return True
        except Refused as error:
            if error.code != "stale":
                raise
            return False
        return True

    def _told(self, task: Task) -> Task:
        status = self._steps.get(task.meta.id)
        return task if status is None else msgspec.structs.replace(task, status=status)

    def _problem(self, task: Task, verdict: Verdict) -> dict[str, Any] | None:
        if verdict.error is None:
            return None
        problem = to_problem(verdict.error)
        serial = self._tail(task.spec.target_id, SERIAL_TAIL) if task.spec.target_kind == "vm" else b""
        if serial and verdict.error.code != "cancelled":
            problem["details"] = {**problem.get("details", {}), "serial": serial.decode(errors="replace")}
        return problem

    async def close(self) -> None:
        """Wait for steps being written."""
        await asyncio.gather(*self._writers.values(), return_exceptions=True)


def _with_steps(current: Task, status: TaskStatus) -> Task | None:
    if current.status.state.final:
        return None
    return msgspec.structs.replace(current, status=status)
