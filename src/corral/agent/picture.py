"""What the agent knows: the records as the watch has shown them, and what it remembers of each machine here.

Everything in it can be rebuilt from the store and the host; nothing in it is the only copy of anything.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from corral.host.hostkey import HostKey
from corral.model import Image, Phase, Resource, Template, Vm
from corral.runtime.random import uuid_from

GRAVES = 10_000
"""Removed ids remembered, so that a late watch event cannot bring a record back. Ids are never used twice."""


@dataclass(slots=True)
class Memory:
    """Remembered of one machine, on the agent's monotonic clock. Lost with the agent, and not missed much."""

    asked: float | None = None
    """First asked to power off, in this boot."""
    repeated: float | None = None
    heard: bool = False
    """Its agent took the request."""
    complained: bool = False
    running: float | None = None
    ending: float | None = None
    stalled: float | None = None
    """Found standing still because of its disk, and not let go on since."""
    disk_error: float | None = None
    disk_words: str = ""
    """When a read or write last failed, and how."""
    measured: Phase | None = None
    """Phase in which its volume was last measured."""
    host_key: HostKey | None = None
    """Made for a fork, ahead of its first answer."""
    marks: dict[str, float] = field(default_factory=dict)
    """Steps of its first start: seconds since it was asked for."""
    warm: bool = False
    """Its process was made ahead."""
    template_wanted: bool = False
    """It boots because there was no template for it."""

    def mark(self, step: str, seconds: float) -> None:
        """A step of its first start is done; the first time counts."""
        self.marks.setdefault(step, round(seconds, 4))


class Picture:
    """The records of VMs, images and templates by id, and the memory of machines."""

    def __init__(self) -> None:
        self.vms: dict[str, Vm] = {}
        self.images: dict[str, Image] = {}
        self.templates: dict[str, Template] = {}
        self.memory: dict[str, Memory] = {}
        self.alive: set[str] = set()
        """VMs that have a process here, as last seen."""
        self._graves: OrderedDict[str, None] = OrderedDict()

    def put(self, obj: Resource) -> bool:
        """Take in a record; False when a newer one is known already."""
        if obj.meta.id in self._graves:
            return False
        kept = self._kept(obj)
        known = kept.get(obj.meta.id)
        if known is not None and known.meta.revision >= obj.meta.revision:
            return False
        kept[obj.meta.id] = obj
        return True

    def _kept(self, obj: Resource) -> dict[str, Any]:
        if isinstance(obj, Vm):
            return self.vms
        assert isinstance(obj, Image | Template), obj
        return self.images if isinstance(obj, Image) else self.templates

    def bury(self, id: str) -> None:
        """A record is gone for good."""
        self.vms.pop(id, None)
        self.images.pop(id, None)
        self.templates.pop(id, None)
        self._graves[id] = None
        if len(self._graves) > GRAVES:
            self._graves.popitem(last=False)

    def exhume(self, id: str) -> None:
        """A record of this id is made anew."""
        self._graves.pop(id, None)

    def of(self, vm_id: str) -> Memory:
        return self.memory.setdefault(vm_id, Memory())

    def using(self, image_id: str) -> list[str]:
        """Ids of the VMs made from an image."""
        return [vm.meta.id for vm in self.vms.values() if vm.spec.image_id == image_id]

    def boots_for_template(self, machine_id: str) -> bool:
        """Whether a machine is the guest of a template in the making."""
        return any(boot_id(id) == machine_id for id in self.templates)

    def waiting_for(self, template_id: str) -> list[str]:
        """Ids of the VMs that must be forked from a template."""
        return [vm.meta.id for vm in self.vms.values() if vm.spec.template == template_id]


def boot_id(template_id: str) -> str:
    """Id of the machine that is booted to be frozen into a template: always the same, so that it is found again."""
    return uuid_from(hashlib.sha256(f"boots for template {template_id}".encode()).digest()[:16])
