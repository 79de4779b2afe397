"""Events: what happened to a thing, for people and programs. Written behind the work, in batches, never in its way."""

from __future__ import annotations

import asyncio

import structlog

from corral.errors import CorralError
from corral.model import Event, EventSpec, Meta, Resource
from corral.runtime import Runtime
from corral.store.objects import Objects

log = structlog.get_logger("events")

QUEUE = 1000
BATCH = 50
MESSAGE = 1000
"""Longest message, characters: guests have a say in some of them."""
RETRY_S = 2.0


class EventLog:
    """Takes events at once and writes them soon. What does not fit the queue is dropped, and logged."""

    def __init__(self, objects: Objects, rt: Runtime) -> None:
        self._objects, self._rt = objects, rt
        self._queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE)

    def emit(self, about: Resource, reason: str, message: str = "", severity: str = "info") -> None:
        """Something happened. ``reason``: one CamelCase word, stable for programs."""
        id, now = self._rt.random.id(), self._rt.clock.now()
        spec = EventSpec(
            about_kind=about.KIND, about_id=about.meta.id, about_name=about.meta.name, reason=reason,
            message=message[:MESSAGE], severity=severity, at=now,
        )  # fmt: skip
        write = log.warning if severity != "info" else log.info
        write(reason, kind=about.KIND, name=about.meta.name, message=spec.message)
        event = Event(meta=Meta(id=id, name=id, project=about.meta.project, created=now), spec=spec)
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.error("an event was dropped: too many wait to be written", reason=reason, name=about.meta.name)

    async def run(self) -> None:
        """Write until cancelled. The store being away loses nothing but the overflow."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._write(batch)

    async def _write(self, batch: list[Event]) -> None:
        while True:
            try:
                await self._objects.create(*batch)
                return
            except CorralError as error:
                if error.code == "exists":  # an answer was lost, the write was not
                    return
                log.warning("events not written, trying again", error=error.message)
                await self._rt.clock.sleep(RETRY_S)
