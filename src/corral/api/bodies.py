"""Bodies of requests and answers, as types: what OpenAPI shows is what is read and written."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from corral.model import FlavorSpec, ImageSpec, Task, TemplateSpec, VmSpec
from corral.model.base import Resource, Struct
from corral.scheduler.explain import Finding


class CreateVms(Struct, frozen=True, kw_only=True):
    """One VM, or ``count`` of them, alike but for their names."""

    name: str | None = None
    """Without one a name is made up. With ``count`` above 1: NAME-1, NAME-2 …"""
    project: str = "default"
    labels: dict[str, str] = {}
    spec: VmSpec
    count: int = 1
    """1 to 100, all or none."""
    timeout_s: float | None = None
    """Seconds after which the launch task fails (the VM goes on booting); default 120."""


class CreateImage(Struct, frozen=True, kw_only=True):
    name: str
    project: str = "default"
    labels: dict[str, str] = {}
    spec: ImageSpec
    timeout_s: float | None = None
    """Seconds after which the task fails; default an hour."""


class CreateFlavor(Struct, frozen=True, kw_only=True):
    name: str
    project: str = "default"
    """Accepted for uniformity: flavors belong to no project."""
    labels: dict[str, str] = {}
    spec: FlavorSpec


class CreateTemplate(Struct, frozen=True, kw_only=True):
    name: str | None = None
    """Without one it is called after its image and size."""
    project: str = "default"
    labels: dict[str, str] = {}
    spec: TemplateSpec
    timeout_s: float | None = None
    """Seconds after which the task fails; default ten minutes."""


class Fork(Struct, frozen=True, kw_only=True):
    """Copies of a running VM, with its memory and disk as they are now, each with an identity of its own."""

    name: str | None = None
    """Without one: the VM's name and some digits. With ``count`` above 1: NAME-1, NAME-2 …"""
    labels: dict[str, str] = {}
    count: int = 1
    """1 to 100, all or none."""
    timeout_s: float | None = None
    """Seconds after which the tasks fail; default 120."""


class Power(Struct, frozen=True, kw_only=True):
    """How to start, stop, restart, reset, pause or resume."""

    force: bool = False
    """Cut the power instead of asking the guest."""
    timeout_s: float | None = None
    """Seconds after which the task fails; default 120."""


class Change(Struct, frozen=True, kw_only=True):
    """A JSON merge patch (RFC 7386): null removes, what is absent stays."""

    labels: dict[str, str | None] = {}
    spec: dict[str, Any] = {}


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing wrong with one field."""

    field: str
    message: str
    expected: str = ""


class ProblemBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error (RFC 9457). ``code`` is stable; ``hint`` says what to do next."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    field: str = ""
    problems: tuple[Problem, ...] = ()
    details: dict[str, Any] = {}


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """What was begun: objects as written and the tasks that bring them about, in the same order."""

    items: tuple[Resource, ...]
    tasks: tuple[Task, ...]


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a VM."""

    at: float
    reason: str
    message: str
    severity: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a VM is as it is: what holds it back, and why it is where it is."""

    vm: str
    phase: str
    reason: str
    host: str
    summary: str
    """What it is doing, in a line."""
    period_s: float | None
    """The seconds that figures of CPU time are averages of; null while nobody measures."""
    findings: tuple[Finding, ...]
    """What holds it back first; never empty."""
    events: tuple[Happened, ...]
    """What happened to it last, the latest first."""
    best: str | None
    """The host that would be chosen now."""
    need: dict[str, Any]
    hosts: tuple[dict[str, Any], ...]
    """What every host says to it: ``host``, ``fits``, ``filter``, ``reason``, ``score``."""


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An image that Corral knows how to get."""

    name: str
    source: Literal["build", "catalogue"] = "catalogue"
    arch: str = ""
    description: str = ""
