"""Memory that is spoken for, host by host, kept up to date by a watch: admission must not read every VM each time.

It also counts VMs that no host has yet, on the host that was best for them when they were admitted: a burst of creates
must not be let in on the same free memory. The agent has the last word (it refuses to start what does not fit).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from corral.errors import WatchLost
from corral.model import Host, Memory, Power, Template, Vm
from corral.model.base import Resource
from corral.scheduler.place import Room, Taken, rooms
from corral.store.objects import Objects


class Booking(NamedTuple):
    """What a VM takes. ``revision``: of the record it was read from."""

    host: str
    memory: Memory
    counts: bool
    revision: int


class Ledger:
    """Rooms of hosts. Without :meth:`run` it reads everything for each answer: right, only slower."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._hosts: dict[str, Host] = {}
        self._templates: dict[str, Template] = {}
        self._vms: dict[str, Booking] = {}
        self._taken: dict[str, Taken] = {}
        self._live = False

    async def run(self) -> None:
        """Follow the records until cancelled."""
        try:
            while True:
                revision = await self._read()
                self._live = True
                try:
                    async for batch in self._objects.watch(Vm, Host, Template, from_revision=revision + 1):
                        for change in batch.changes:
                            if change.object is None:
                                self._drop(change.kind, change.id)
                            else:
                                self.put(change.object)
                except WatchLost:
                    self._live = False
        finally:
            self._live = False

    async def rooms(self, *, without: str = "") -> list[Room]:
        """Every host as a room; the VM ``without`` counts as gone."""
        if not self._live:
            await self._read()
        found = []
        for room in rooms(self._hosts.values(), (), templates=self._templates.values()):
            taken = self._taken.get(room.host, Taken())
            own = self._vms.get(without)
            if own is not None and own.counts and own.host == room.host:
                taken = taken.plus(own.memory, -1)
            found.append(room._replace(used=taken.memory, promised=taken.reserve, vms=taken.vms))
        return found

    def book(self, vm: Vm, host: str) -> None:
        """Count a VM that placement has not seen yet on the host that was found for it."""
        self._set(vm.meta.id, Booking(host, vm.spec.memory, True, 0))

    def drop(self, id: str) -> None:
        """Take back what was booked."""
        self._drop(Vm.KIND, id)

    def put(self, obj: Resource) -> None:
        """Take in a record, unless a newer one is known."""
        if isinstance(obj, Host):
            self._hosts[obj.meta.id] = obj
        if isinstance(obj, Template):
            self._templates[obj.meta.id] = obj
        if not isinstance(obj, Vm):
            return
        known = self._vms.get(obj.meta.id)
        if known is not None and known.revision > obj.meta.revision:
            return
        host = obj.status.host or (known.host if known is not None else "")
        counts = obj.spec.power is not Power.STOPPED and obj.meta.deleted is None and host != ""
        self._set(obj.meta.id, Booking(host, obj.spec.memory, counts, obj.meta.revision))

    async def _read(self) -> int:
        hosts, vms = await self._objects.list(Host), await self._objects.list(Vm)
        templates = await self._objects.list(Template)
        self._templates = {template.meta.id: template for template in templates.items}
        self._hosts = {host.meta.id: host for host in hosts.items}
        self._forget_gone(vm.meta.id for vm in vms.items)
        for vm in vms.items:
            self.put(vm)
        return min(hosts.revision, vms.revision, templates.revision)

    def _forget_gone(self, there: Iterable[str]) -> None:
        kept = set(there)
        for id in [id for id, booking in self._vms.items() if id not in kept and booking.revision]:
            self._drop(Vm.KIND, id)

    def _drop(self, kind: str, id: str) -> None:
        if kind == Host.KIND:
            self._hosts.pop(id, None)
        elif kind == Template.KIND:
            self._templates.pop(id, None)
        else:
            self._add(self._vms.pop(id, None), -1)

    def _set(self, id: str, booking: Booking) -> None:
        self._add(self._vms.get(id), -1)
        self._vms[id] = booking
        self._add(booking, 1)

    def _add(self, booking: Booking | None, sign: int) -> None:
        if booking is not None and booking.counts:
            self._taken[booking.host] = self._taken.get(booking.host, Taken()).plus(booking.memory, sign)
