"""Waiting for tasks: on the watch stream, with progress on stderr, until each has ended or the patience has.

The work never depends on the waiting: Ctrl-C or a lost connection leaves it going. A daemon that restarts meanwhile is
waited for, because tasks are durable.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from corral.cli import failures
from corral.cli.output import Object
from corral.cli.progress import Progress, phrase
from corral.cli.session import Session
from corral.errors import CorralError, TimedOut, Unavailable, WatchLost, from_problem

FINAL = frozenset({"done", "failed", "cancelled"})
RECONNECT_S = 30.0
"""How long a daemon may be away while we wait."""


class Waiting:
    """Some tasks, as last seen."""

    def __init__(self, session: Session, tasks: Iterable[Object]) -> None:
        self.session = session
        self.tasks = {task["meta"]["id"]: task for task in tasks}

    def open(self) -> list[Object]:
        """Those that have not ended."""
        return [task for task in self.tasks.values() if task["status"]["state"] not in FINAL]

    def run(self, timeout_s: float | None = None) -> list[CorralError]:
        """Wait until all have ended; the errors of those that failed, in the order they were given.

        Raises KeyboardInterrupt after saying how to cancel what goes on. ``timeout_s`` bounds the waiting alone.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with Progress() as progress:
            try:
                self._follow(progress, until)
            except KeyboardInterrupt:
                progress.close()
                self._say_what_goes_on()
                raise
        return [error for error in map(self._error, self.tasks.values()) if error is not None]

    def _follow(self, progress: Progress, until: float | None) -> None:
        lost_since: float | None = None
        while self.open() and not _past(until):
            try:
                looked = False
                for batch in self.session.client.watch("task", until=until):
                    if not looked:
                        self._look(progress)  # after the watch began, so that nothing falls in between
                        looked, lost_since = True, None
                    self._take(batch.changes, progress)
                    if not self.open() or _past(until):
                        break
            except Unavailable as error:
                lost_since = lost_since or time.monotonic()
                if not isinstance(error, TimedOut | WatchLost) and time.monotonic() - lost_since > RECONNECT_S:
                    raise
                time.sleep(0.1)

    def _look(self, progress: Progress) -> None:
        """Read the open tasks: what happened before the watch began, or while it was lost."""
        for task in self.open():
            seen = self.session.get("task", task["meta"]["id"])
            self.tasks[seen["meta"]["id"]] = seen
            progress.show(seen)

    def _take(self, changes: list[Object], progress: Progress) -> None:
        for change in changes:
            if change["id"] in self.tasks and change.get("object"):
                self.tasks[change["id"]] = change["object"]
                progress.show(change["object"])

    def _say_what_goes_on(self) -> None:
        for task in self.open():
            spec, number = task["spec"], task["meta"]["id"]
            failures.line(f"still going on: {spec['verb']} {spec['target_name']} (task {number})")
            failures.line(f"hint: to cancel it: corral task cancel {number}; to wait again: corral task wait {number}")

    def _error(self, task: Object) -> CorralError | None:
        spec, status = task["spec"], task["status"]
        if status["state"] == "done":
            return None
        if status["state"] not in FINAL:
            return TimedOut(
                f"{spec['verb']} {spec['target_name']} has not ended yet: {step_of(task) or 'it has not begun'}",
                hint=f"it goes on; to cancel it: corral task cancel {task['meta']['id']}",
            )
        problem = status.get("error") or {"code": status["state"], "detail": f"{spec['verb']} was {status['state']}"}
        error = from_problem(problem)
        error.details = dict(problem.get("details") or {})
        return error


def step_of(task: Object) -> str:
    """The step that a task is at, as a sentence; empty before the first."""
    begun = [s for s in task["status"].get("steps", []) if s["state"] != "pending"]
    if not begun:
        return ""
    return phrase(begun[-1])


def _past(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until
