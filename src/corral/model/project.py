"""A project: whose things these are. One, ``default``, exists from the start."""

from __future__ import annotations

from typing import ClassVar

from corral.model.base import Resource, Struct


class ProjectSpec(Struct, frozen=True, kw_only=True):
    description: str = ""
    cpu_weight: int = 100
    """Share of all its VMs together against other projects, 1 to 10000."""
    cpu_limit: float | None = None
    """Cores' time that all its VMs get together at most; None: the whole host."""
    cpu_reserve: float = 0.0
    """Cores' time that its VMs get together whenever they want it."""


class Project(Resource, frozen=True, kw_only=True, tag_field="kind", tag="project"):
    KIND: ClassVar[str] = "project"
    spec: ProjectSpec = ProjectSpec()
