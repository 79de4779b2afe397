"""Keeps what would grow for ever bounded: old events, finished tasks; and ends tasks that nobody else ends."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import structlog

from corral.errors import CorralError, Refused, TimedOut, to_problem
from corral.model import Event, Resource, Task, TaskState
from corral.runtime import Runtime
from corral.store.objects import Objects, Remove

log = structlog.get_logger("collect")

EVENTS = 10_000
TASKS = 1_000
"""Finished ones; each also keeps its idempotency key alive for as long."""
EVERY_S = 60.0
GRACE_S = 30.0
"""An agent that lives ends its tasks itself, and says better why."""
BATCH = 100


class Collector:
    """The collecting loop."""

    def __init__(self, objects: Objects, rt: Runtime, *, events: int = EVENTS, tasks: int = TASKS) -> None:
        self._objects, self._rt, self._events, self._most_tasks = objects, rt, events, tasks

    async def run(self) -> None:
        """Collect until cancelled."""
        while True:
            await self._rt.clock.sleep(EVERY_S)
            try:
                await self.once()
            except CorralError as error:
                log.warning("collecting failed, tried again later", error=error.message)

    async def once(self) -> None:
        """One round."""
        tasks = (await self._objects.list(Task)).items
        for task in tasks:
            if not task.status.state.final:
                await self._expire(task)
        over = sorted((t for t in tasks if t.status.state.final), key=lambda t: (t.status.ended or 0.0, t.meta.id))
        await self._remove(over[: max(0, len(over) - self._most_tasks)])
        events = sorted((await self._objects.list(Event)).items, key=lambda e: (e.spec.at, e.meta.revision))
        await self._remove(events[: max(0, len(events) - self._events)])

    async def _expire(self, task: Task) -> None:
        """A task long past its deadline belongs to nobody who lives."""
        now = self._rt.clock.now()
        if now < task.meta.created + task.spec.deadline_s + GRACE_S:
            return
        error = TimedOut(
            f"{task.spec.verb} of {task.spec.target_name or task.spec.target_id} took longer than "
            f"{task.spec.deadline_s:g} s, and no host reported on it",
            hint="is the host up?",
        )
        ended = msgspec.structs.replace(
            task.status, state=TaskState.FAILED, ended=now, started=task.status.started or now, error=to_problem(error)
        )

        def end(current: Task) -> Task | None:
            return None if current.status.state.final else msgspec.structs.replace(current, status=ended)

        await self._objects.change(Task, task.meta.id, end)

    async def _remove(self, objects: Sequence[Resource]) -> None:
        for start in range(0, len(objects), BATCH):
            try:
                await self._objects.commit([Remove(obj) for obj in objects[start : start + BATCH]])
            except Refused as error:
                if error.code != "stale":  # somebody else collects too: the next round sees what is left
                    raise
