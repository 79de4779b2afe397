"""How much templates may take, and which go first. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from corral.model import Template, TemplatePhase, TemplateSpec

LOADED = (TemplatePhase.BUILDING, TemplatePhase.READY, TemplatePhase.STALE, TemplatePhase.LOST)
"""Phases in which one takes memory."""


class Budget(NamedTuple):
    """Bytes that templates which the platform made by itself may take together."""

    memory: int
    disk: int


def holds(template: Template) -> int:
    """Bytes of memory that a template takes, or will take once it is made."""
    return (template.status.memory or template.spec.memory) if template.status.phase in LOADED else 0


def idle(template: Template) -> bool:
    """The platform made it, and nobody runs on it: it may go."""
    spec, status = template.spec, template.status
    settled = status.phase not in (TemplatePhase.PENDING, TemplatePhase.BUILDING)
    return spec.auto and not spec.source and settled and not status.forks and template.meta.deleted is None


def least_recent(templates: Iterable[Template]) -> list[Template]:
    """Those that may go, the one that was used least recently first."""
    found = [one for one in templates if idle(one)]
    return sorted(found, key=lambda one: (one.status.used_at or one.status.made_at or one.meta.created, one.meta.id))


def make_room(spec: TemplateSpec, templates: Iterable[Template], budget: Budget) -> list[Template] | None:
    """Which templates go so that a new one of the platform's fits the budget; None: it does not, whoever goes.

    What its files will take is not known before: as much as its memory is the most that is likely.
    """
    mine = [one for one in templates if one.spec.auto and not one.spec.source and one.meta.deleted is None]
    memory = sum(holds(one) for one in mine) + spec.memory
    disk = sum(one.status.disk for one in mine) + spec.memory
    going = []
    for one in least_recent(mine):
        if memory <= budget.memory and disk <= budget.disk:
            break
        memory, disk = memory - holds(one), disk - one.status.disk
        going.append(one)
    return going if memory <= budget.memory and disk <= budget.disk else None
