"""Tasks and events: what is being done, and what happened."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from corral.model.base import Resource, Struct


class TaskState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED)


class Step(Struct, frozen=True, kw_only=True):
    """One step of a task, as people read it."""

    name: str
    state: TaskState = TaskState.PENDING
    started: float | None = None
    ended: float | None = None
    message: str = ""


class TaskSpec(Struct, frozen=True, kw_only=True):
    """What was asked. Written once; only ``cancel`` changes."""

    verb: str
    """launch, start, stop, restart, reset, pause, resume, delete, fetch, build …"""
    target_kind: str
    target_id: str
    target_name: str = ""
    generation: int = 0
    """Generation of the target's spec that fulfils this task."""
    deadline_s: float = 120.0
    """Seconds after creation at which it fails."""
    key: str = ""
    """Idempotency key of the request."""
    fingerprint: str = ""
    """sha256 of the request under that key."""
    cancel: bool = False


class TaskStatus(Struct, frozen=True, kw_only=True):
    state: TaskState = TaskState.PENDING
    steps: tuple[Step, ...] = ()
    progress: float | None = None
    """0 to 1 where it can be told."""
    started: float | None = None
    ended: float | None = None
    error: dict[str, Any] | None = None
    """A problem body."""
    result: dict[str, Any] = {}


class Task(Resource, frozen=True, kw_only=True, tag_field="kind", tag="task"):
    KIND: ClassVar[str] = "task"
    spec: TaskSpec
    status: TaskStatus = TaskStatus()


class EventSpec(Struct, frozen=True, kw_only=True):
    """Something that happened to an object."""

    about_kind: str
    about_id: str
    about_name: str = ""
    reason: str
    """One CamelCase word, stable for programs: Started, Exited, GuestPanic …"""
    message: str = ""
    severity: str = "info"
    """``info``, ``warning`` or ``error``."""
    at: float = 0.0


class Event(Resource, frozen=True, kw_only=True, tag_field="kind", tag="event"):
    KIND: ClassVar[str] = "event"
    spec: EventSpec
