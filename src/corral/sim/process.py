"""A simulated process: some tasks, and the memory they hold, that can die at any await and be started again.

Every task belongs to the process in whose context it was made. A crash cancels them all at once; whatever they still
try in their ``finally`` blocks finds the world closed to them (:meth:`Process.check`), as it is for the dead.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

from corral.errors import Bug

_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)

MOST_ROUNDS = 200
"""Rounds of cancelling before a task counts as one that cannot be ended."""


class Process:
    """One life of a process; a restart makes a new one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = asyncio.Event()
        self._tasks: dict[asyncio.Task[Any], None] = {}  # a dict: in the order in which they were made

    def check(self) -> None:
        """Called before anything that others can see. Raises CancelledError in a dead process."""
        if self.dead.is_set():
            raise asyncio.CancelledError(f"{self.name} is dead")

    def start(self, work: Callable[[], Coroutine[Any, Any, Any]], name: str) -> asyncio.Task[Any]:
        """Run ``work()`` as a task of this process."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        return asyncio.get_running_loop().create_task(_inside(work), name=f"{self.name}/{name}", context=context)

    def crash(self) -> None:
        """Die, now. The caller, if it is inside, ends at its next await."""
        self.dead.set()
        for task in list(self._tasks):
            task.cancel()

    async def buried(self) -> None:
        """Wait until the last task of a crashed process has ended. Raises Bug when one does not let itself be ended."""
        for _ in range(MOST_ROUNDS):
            left = [task for task in self._tasks if not task.done()]
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0)
        raise Bug(f"a task of {self.name} swallows its cancellation: {[task.get_name() for task in left]}")

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        if self.dead.is_set():
            task.cancel()


async def _inside(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return await work()


def track_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Have every new task of the loop belong to the process that makes it."""

    def make(owner: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=owner, **options)
        context = options.get("context")
        process = context.get(_current) if context is not None else _current.get()
        if process is not None:
            process.adopt(task)
        return task

    loop.set_task_factory(make)
