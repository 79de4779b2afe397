"""What the platform promises, without HTTP: every request's meaning, its checks, and what it writes.

The API puts routes in front of it, the simulator calls it directly. It writes wishes and tasks into the store, each
request in one transaction, and never talks to a controller or an agent. Bodies arrive as JSON trees (dictionaries) and
are checked here, so that every caller is told the same. The parts, each on top of the one before:
ground (idempotency, swap with a task), launch (new VMs, admission), power (verbs, delete, cancel), images, templates
(and forks), changes (patch, defaults, flavors).
"""

from __future__ import annotations

from typing import Any

from corral.api.service.changes import PATCHABLE, Changing
from corral.api.service.power import VERBS
from corral.errors import Bug
from corral.model.base import Resource

__all__ = ["PATCHABLE", "VERBS", "Service"]


class Service(Changing):
    """``Service(objects, rt, catalogue=())``; ``catalogue``: entries (``name``, ``source`` …) that images come from."""

    async def run(self) -> None:
        """Keep the ledger of memory up to date until cancelled. Everything works without it, only slower."""
        await self.ledger.run()

    async def create(self, kind: str, tree: Any, *, key: str = "", dry_run: bool = False) -> Any:
        """Create by kind: Accepted for VMs and images, the object itself for others."""
        if kind == "vm":
            return await self.create_vms(tree, key=key, dry_run=dry_run)
        if kind == "image":
            return await self.create_image(tree, key=key)
        if kind == "template":
            return await self.create_template(tree, key=key)
        if kind == "flavor":
            flavor: Resource = await self.create_flavor(tree, key=key)
            return flavor
        raise Bug(f"{kind} is not created by users")
