"""A project: whose things these are. One, ``default``, exists from the start."""

from __future__ import annotations

from typing import ClassVar

from corral.model.base import Resource, Struct


class ProjectSpec(Struct, frozen=True, kw_only=True):
    description: str = ""


class Project(Resource, frozen=True, kw_only=True, tag_field="kind", tag="project"):
    KIND: ClassVar[str] = "project"
    spec: ProjectSpec = ProjectSpec()
