"""What the API answers with: plain dictionaries that also know their way around.

A command prints them as they came; a program reads ``vm.name``, ``vm.phase``, ``vm.status["ports"]``, or asks for the
model's own class with :meth:`Record.typed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from corral.client.frames import Output
from corral.errors import CorralError, Refused, from_problem

PLURALS = {"vm": "vms", "image": "images", "task": "tasks", "volume": "volumes", "flavor": "flavors", "host": "hosts",
           "network": "networks", "project": "projects", "event": "events",
           "template": "templates"}  # fmt: skip
"""Resource of a kind. Not read from the model: a command that lists VMs must not load all of it."""
BUILT = ("micro", "debian")
"""Images that are built on the daemon's machine rather than fetched."""
FINAL = ("done", "failed", "cancelled")
"""States of a task that has ended."""
SILENCE_S = 35.0
"""A watch sends a heartbeat every 10 s: after three that are missing the connection is dead."""
RECONNECT_S = 30.0
"""How long a wait goes on looking for a daemon that went away: it is restarted meanwhile, and the work goes on."""


class Record(dict[str, Any]):
    """One object: ``{"kind", "meta", "spec", "status"}``."""

    @property
    def kind(self) -> str:
        return str(self["kind"])

    @property
    def meta(self) -> dict[str, Any]:
        return dict(self["meta"])

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self["spec"])

    @property
    def status(self) -> dict[str, Any]:
        """Empty for kinds that have none."""
        return dict(self.get("status") or {})

    @property
    def id(self) -> str:
        return str(self["meta"]["id"])

    @property
    def name(self) -> str:
        return str(self["meta"]["name"])

    @property
    def project(self) -> str:
        return str(self["meta"]["project"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self["meta"]["labels"])

    @property
    def revision(self) -> int:
        return int(self["meta"]["revision"])

    @property
    def phase(self) -> str:
        """``status.phase``, or a task's ``status.state``; empty where there is none."""
        return str(self.status.get("phase") or self.status.get("state") or "")

    def typed(self) -> Any:
        """The same as an object of :mod:`corral.model` (:class:`~corral.model.Vm` for a VM)."""
        import msgspec

        from corral.model.kinds import KINDS

        return msgspec.convert({k: v for k, v in self.items() if k != "kind"}, KINDS[self.kind].cls)


class Page(NamedTuple):
    """Some objects as of one revision; ``cursor`` leads to the rest, None when that was all."""

    items: list[Record]
    revision: int
    cursor: str | None


class Accepted(NamedTuple):
    """What was begun: the objects as written, and the tasks that say how far it is."""

    items: list[Record]
    tasks: list[Record]


class Batch(NamedTuple):
    """Changes of one revision; an empty one is a heartbeat. ``object`` of a change is None when it was deleted."""

    revision: int
    changes: list[dict[str, Any]]


class Result(NamedTuple):
    """How a program in a guest ended: its status (128+n for a signal) and what it printed.

    ``limit``: the limit that it reached, empty for none. ``output``: it printed more than it may and was killed (status
    137; what it had printed is here). ``processes``: it wanted more of them than it may have.
    """

    status: int
    stdout: bytes
    stderr: bytes
    limit: str = ""

    @property
    def text(self) -> str:
        """stdout as text."""
        return self.stdout.decode(errors="replace")


KILLED = 137
"""128 + SIGKILL."""


class Printed:
    """What a program has printed, up to ``most`` bytes of both streams together (None: all of it)."""

    def __init__(self, most: int | None) -> None:
        self._room, self._parts = most, {1: bytearray(), 2: bytearray()}

    def take(self, piece: Output) -> bool:
        """One more piece; False when that is more than there is room for (what fits is kept)."""
        data = piece.data if self._room is None else piece.data[: self._room]
        self._parts[piece.stream] += data
        if self._room is not None:
            self._room -= len(data)
        return len(data) == len(piece.data)

    def result(self, status: int, limit: str = "") -> Result:
        return Result(status, bytes(self._parts[1]), bytes(self._parts[2]), limit)


def task_error(task: Record) -> CorralError:
    """The error that a failed or cancelled task carries."""
    body = task.status.get("error") or {"code": "cancelled" if task.phase == "cancelled" else "failed"}
    error = from_problem({"detail": f"the task was {task.phase}", **body})
    error.details.update(body.get("details") or {})
    return error


def read_batch(line: bytes) -> Batch:
    """A line of a watch stream. Raises the error with which a stream may end."""
    read = json.loads(line)
    if "error" in read:
        raise from_problem(read["error"])
    return Batch(read["revision"], read["changes"])


def vm_spec(
    image: str, *, cpus: int | None, memory: int | str | None, disk: int | str | None, flavor: str | None,
    spec: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The spec that a launch means: only what is given, so that the flavor supplies the rest."""
    from corral.units import parse_size

    wanted: dict[str, Any] = {**(spec or {}), "image": image}
    for group, field, value in (("memory", "size", memory), ("disk", "size", disk)):
        if value is not None:
            wanted[group] = {**wanted.get(group, {}), field: parse_size(value, f"{group}.size")}
    if cpus is not None:
        wanted["cpu"] = {**wanted.get("cpu", {}), "count": cpus}
    if flavor is not None:
        if "flavor" in wanted and wanted["flavor"] != flavor:
            raise Refused("two flavors are given", code="usage")
        wanted["flavor"] = flavor
    return wanted
