"""What every part of the service stands on: projects, names, idempotency, read-modify-write with a task beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from corral.api.service.ledger import Ledger
from corral.errors import Invalid, NotFound, Problem, Refused
from corral.model import Meta, Project, Task, TaskSpec
from corral.model.base import Resource
from corral.runtime import Runtime
from corral.runtime.random import uuid_from
from corral.store.holds import Holds
from corral.store.objects import Create, Objects, Update, Write
from corral.store.protocol import Entry
from corral.store.ready import ReadyBook

T = TypeVar("T", bound=Resource)

ROUNDS = 100
"""Read-modify-swap rounds: agents write status at the same time, and fifty people may command one VM."""
DEADLINE_S = 120.0
"""Default of a task on a VM."""


class Ground:
    """Base of the parts of :class:`~corral.api.service.Service`."""

    def __init__(self, objects: Objects, rt: Runtime, *, catalogue: Sequence[Mapping[str, Any]] = ()) -> None:
        self.objects, self.rt = objects, rt
        self.offered = tuple(dict(entry) for entry in catalogue)
        self.ledger = Ledger(objects)
        self.holds = Holds(objects.store, rt)
        self.ready = ReadyBook(objects.store)

    async def project(self, name: str) -> None:
        """Raises NotFound for a project that does not exist."""
        try:
            found = await self.objects.find(Project, name)
        except NotFound:
            found = None
        if found is None or found.meta.name != name:
            raise NotFound(f"there is no project {name!a}", hint="see the projects there are with: corral project list")

    def meta(self, name: str, project: str, labels: dict[str, str], id: str = "") -> Meta:
        return Meta(
            id=id or self.rt.random.id(), name=name, project=project, labels=labels, created=self.rt.clock.now()
        )

    def task(
        self, verb: str, target: Resource, *, deadline_s: float | None, key: str = "", fingerprint: str = "",
        number: int = 0, default_s: float = DEADLINE_S,
    ) -> Task:  # fmt: skip
        """A new task about ``target``. Its id follows from the idempotency key, if there is one: that makes it once."""
        project = target.meta.project
        id = key_id(project, key, number) if key else self.rt.random.id()
        return Task(
            meta=self.meta(id, project, {}, id),
            spec=TaskSpec(
                verb=verb, target_kind=target.KIND, target_id=target.meta.id, target_name=target.meta.name,
                generation=target.meta.generation, deadline_s=deadline_s or default_s, key=key, fingerprint=fingerprint,
            ),
        )  # fmt: skip

    async def replay(self, key: str, project: str, fingerprint: str) -> tuple[Task, ...]:
        """The tasks of an earlier request under this key; none if there was none.

        Raises Refused ``idempotency`` when that was another request.
        """
        if not key:
            return ()
        if not (len(key) <= 128 and key.isascii() and key.isprintable() and " " not in key):
            raise Invalid([Problem("Idempotency-Key", "is no key", "1 to 128 printable ASCII characters, no space")])
        found: list[Task] = []
        while True:
            try:
                task = await self.objects.get(Task, key_id(project, key, len(found)))
            except NotFound:
                return tuple(found)
            if task.spec.fingerprint != fingerprint:
                raise Refused(
                    "this idempotency key was used for another request", code="idempotency",
                    hint="a new request needs a new key",
                )  # fmt: skip
            found.append(task)

    async def commit(self, writes: Sequence[Write], *, taking: Sequence[Entry] = ()) -> tuple[Resource, ...]:
        """Write everything, or nothing, passing the fault points on both sides. ``taking``: keys that go with it."""
        await self.rt.faults.at("api.before-commit")
        written = await self.objects.commit(writes, taking=taking)
        await self.rt.faults.at("api.after-commit")
        for obj in written:
            self.ledger.put(obj)
        return written

    async def swap(self, cls: type[T], id: str, plan: Callable[[T], tuple[T, Task | None]]) -> tuple[T, Task | None]:
        """Read, plan, write object and task in one transaction; again when somebody was faster."""
        for _ in range(ROUNDS):
            wanted, task = plan(await self.objects.get(cls, id))
            writes: list[Write] = [Update(wanted), *([Create(task)] if task is not None else [])]
            try:
                written = await self.commit(writes)
            except Refused as error:
                if error.code == "stale":
                    continue
                raise
            obj, made = written[0], written[1] if task is not None else None
            assert isinstance(obj, cls)
            assert made is None or isinstance(made, Task)
            return obj, made
        raise Refused("the object kept changing while it was being written", code="conflict", hint="try again")


def key_id(project: str, key: str, number: int) -> str:
    """The id of the ``number``-th thing that the request under ``key`` makes."""
    return uuid_from(hashlib.sha256(f"{project}\0{key}\0{number}".encode()).digest()[:16])


def fingerprint_of(what: str, tree: Any) -> str:
    """What tells one request from another under the same key."""
    return hashlib.sha256(what.encode() + b"\0" + msgspec.json.encode(tree, order="deterministic")).hexdigest()


def changed(obj: T, **fields: Any) -> T:
    """The object with other fields."""
    return msgspec.structs.replace(obj, **fields)


def bumped(meta: Meta) -> Meta:
    """The meta of an object whose spec changes."""
    return msgspec.structs.replace(meta, generation=meta.generation + 1)
