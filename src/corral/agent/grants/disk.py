"""Limits of running VMs' disks, as their records say. Every second what is wanted is compared with what this process
of the VM was last given, and what differs is set: a cut at once, growth in steps.

After a start of the daemon nothing is known of what was given before, so each disk is set once. Every VM is waited for
on its own: a hypervisor that is silent delays no other.
"""

from __future__ import annotations

import asyncio
import math

from corral.agent.events import EventLog
from corral.agent.host import Registration
from corral.agent.machine import ROOT, limits_of
from corral.agent.picture import Picture
from corral.engine.protocol import Engine, Limits
from corral.errors import CorralError, NotFound, Refused, Unavailable
from corral.model import Phase, Vm
from corral.runtime import Runtime
from corral.scheduler.ramp import DISK_STEPS, ramp

EVERY_S = 1.0
WITH_DISKS = (Phase.STARTING, Phase.RUNNING, Phase.PAUSED, Phase.STOPPING)
"""Phases in which a hypervisor can be expected to answer."""

Key = tuple[str, int]
"""A VM and the process it had."""


class DiskGrants:
    """Run one per host."""

    def __init__(
        self, engine: Engine, picture: Picture, registration: Registration, events: EventLog, rt: Runtime
    ) -> None:
        self._engine, self._picture, self._registration = engine, picture, registration
        self._events, self._rt = events, rt
        self._given: dict[Key, Limits] = {}
        self._refused: dict[Key, Limits] = {}
        self._busy: set[Key] = set()

    async def run(self) -> None:
        """Keep limits as they are wanted, until cancelled."""
        self._busy.clear()
        async with asyncio.TaskGroup() as group:
            while True:
                for vm, key in self._to_change():
                    self._busy.add(key)
                    group.create_task(self._give(vm, key))
                await self._rt.clock.sleep(EVERY_S)

    def _to_change(self) -> list[tuple[Vm, Key]]:
        here = [vm for id in sorted(self._picture.alive) if (vm := self._picture.vms.get(id)) is not None]
        running = {
            (vm.meta.id, vm.status.pid): vm
            for vm in here
            if vm.status.host == self._registration.name and vm.status.pid is not None
        }
        self._given = {key: limits for key, limits in self._given.items() if key in running}
        self._refused = {key: limits for key, limits in self._refused.items() if key in running}
        return [
            (vm, key)
            for key, vm in running.items()
            if vm.status.phase in WITH_DISKS and key not in self._busy
            if limits_of(vm.spec.disk) not in (self._given.get(key), self._refused.get(key))
        ]

    async def _give(self, vm: Vm, key: Key) -> None:
        wanted = limits_of(vm.spec.disk)
        limits = toward(self._given.get(key), wanted)
        try:
            await self._engine.throttle(vm.meta.id, ROOT, limits)
            self._given[key] = limits
        except NotFound:
            self._given[key] = wanted  # it runs from memory alone and has no disk
        except (Refused, Unavailable):
            return  # it has just ended, or does not answer: the next look finds it so, or tries again
        except CorralError as error:
            self._refused[key] = wanted  # until they change, trying again would only say it again
            self._events.emit(vm, "DiskLimitsRefused", error.message, "warning")
        finally:
            self._busy.discard(key)


def toward(given: Limits | None, wanted: Limits) -> Limits:
    """The next limits on the way to ``wanted``.

    What was given may be unknown (None): then all of it. No limit has no parts, so from there and to there it is one
    step.
    """
    if given is None:
        return wanted
    return Limits(
        iops=_next(given.iops, wanted.iops), iops_burst=_next(given.iops_burst or given.iops, wanted.iops_burst),
        bandwidth=_next(given.bandwidth, wanted.bandwidth),
        bandwidth_burst=_next(given.bandwidth_burst or given.bandwidth, wanted.bandwidth_burst), burst_s=wanted.burst_s,
    )  # fmt: skip


def _next(given: int, wanted: int) -> int:
    return math.ceil(ramp(given, wanted, wanted, DISK_STEPS)) if given and wanted else wanted
