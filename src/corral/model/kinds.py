"""The one table of kinds. Key prefixes, API routes, CLI nouns and table columns are read from here."""

from __future__ import annotations

from typing import NamedTuple

from corral.errors import NotFound
from corral.model.base import Resource
from corral.model.flavor import Flavor
from corral.model.host import Host
from corral.model.image import Image
from corral.model.network import Network
from corral.model.project import Project
from corral.model.record import Event, Task
from corral.model.template import Template
from corral.model.vm import Vm
from corral.model.volume import Volume


class Column(NamedTuple):
    """One column of a table: heading, path into the object, how to print it, and whether only ``-o wide`` shows it."""

    title: str
    path: str
    form: str = ""
    """``size``, ``age``, ``time``, ``ports``, ``list`` or empty for text."""
    wide: bool = False


class Kind(NamedTuple):
    """One kind. ``scoped``: lives in a project. ``writable``: users may create and delete it through the API."""

    name: str
    plural: str
    cls: type[Resource]
    scoped: bool
    writable: bool
    columns: tuple[Column, ...]
    summary: str


C = Column
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("vm", "vms", Vm, True, True, (
            C("NAME", "meta.name"), C("PHASE", "status.phase"), C("IMAGE", "spec.image"), C("CPUS", "spec.cpu.count"),
            C("MEMORY", "spec.memory.size", "size"), C("PORTS", "status.ports", "ports"),
            C("AGE", "meta.created", "age"), C("REASON", "status.reason"), C("HOST", "status.host", "", True),
            C("ACCEL", "status.accelerator", "", True), C("PID", "status.pid", "", True), C("ID", "meta.id", "", True),
        ), "a virtual machine"),
        Kind("image", "images", Image, True, True, (
            C("NAME", "meta.name"), C("PHASE", "status.phase"), C("SOURCE", "spec.source"), C("ARCH", "spec.arch"),
            C("SIZE", "status.size", "size"), C("DISK", "status.virtual_size", "size"), C("AGE", "meta.created", "age"),
            C("REASON", "status.reason"), C("DIGEST", "status.digest", "", True), C("ID", "meta.id", "", True),
        ), "something VMs boot from"),
        Kind("template", "templates", Template, True, True, (
            C("NAME", "meta.name"), C("PHASE", "status.phase"), C("IMAGE", "spec.image"), C("CPUS", "spec.cpus"),
            C("MEMORY", "spec.memory", "size"), C("CARDS", "spec.cards"), C("DISK", "status.disk", "size"),
            C("FORKS", "status.forks"), C("WARM", "status.warm"),
            C("USED", "status.used_at", "age"), C("AUTO", "spec.auto"), C("REASON", "status.reason"),
            C("HOLDS", "status.memory", "size", True), C("HOST", "status.host", "", True), C("ID", "meta.id", "", True),
        ), "a booted VM, frozen: others fork from it"),
        Kind("flavor", "flavors", Flavor, False, True, (
            C("NAME", "meta.name"), C("CPUS", "spec.cpus"), C("MEMORY", "spec.memory", "size"),
            C("DISK", "spec.disk", "size"),
        ), "a plan: CPUs, memory, disk"),
        Kind("volume", "volumes", Volume, True, False, (
            C("NAME", "meta.name"), C("PHASE", "status.phase"), C("SIZE", "spec.size", "size"),
            C("USED", "status.used", "size"), C("VM", "spec.vm"), C("ID", "meta.id", "", True),
        ), "a disk of a VM"),
        Kind("network", "networks", Network, False, False, (
            C("NAME", "meta.name"), C("MODE", "spec.mode"), C("CIDR", "spec.cidr"),
            C("DESCRIPTION", "spec.description"),
        ), "what NICs are plugged into"),
        Kind("project", "projects", Project, False, False, (
            C("NAME", "meta.name"), C("DESCRIPTION", "spec.description"),
        ), "whose things these are"),
        Kind("host", "hosts", Host, False, False, (
            C("NAME", "meta.name"), C("PHASE", "status.phase"), C("CPUS", "status.cpus"),
            C("MEMORY", "status.memory", "size"), C("ACCEL", "status.accelerator"), C("ENGINE", "status.engine"),
            C("KERNEL", "status.kernel", "", True), C("ID", "meta.id", "", True),
        ), "a machine that runs VMs"),
        Kind("task", "tasks", Task, True, False, (
            C("ID", "meta.id"), C("VERB", "spec.verb"), C("TARGET", "spec.target_name"), C("STATE", "status.state"),
            C("STEP", "status.steps", "step"), C("AGE", "meta.created", "age"),
        ), "a durable, cancellable operation"),
        Kind("event", "events", Event, True, False, (
            C("TIME", "spec.at", "time"), C("KIND", "spec.about_kind"), C("NAME", "spec.about_name"),
            C("REASON", "spec.reason"), C("MESSAGE", "spec.message"),
        ), "something that happened"),
    )
}  # fmt: skip

PLURALS: dict[str, Kind] = {kind.plural: kind for kind in KINDS.values()}


def kind_of(name: str) -> Kind:
    """The kind of a name, singular or plural. Raises :class:`NotFound` for any other word."""
    kind = KINDS.get(name) or PLURALS.get(name)
    if kind is None:
        raise NotFound(f"there is no kind {name!r}", hint=f"kinds are: {', '.join(KINDS)}")
    return kind
