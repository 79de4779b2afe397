"""What VMs do with their drives and cards: counters of their QEMUs, and rates as the difference between two looks.

Asked only when somebody looks. Who asks is not kept waiting by a QEMU that does not answer: what is not there in time
is left out, that time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from corral.engine.protocol import CardStats, DriveStats, Engine, Stats
from corral.errors import CorralError
from corral.model import Phase, Vm
from corral.model.usage import DiskUsage, NicUsage
from corral.runtime import Runtime

PATIENCE_S = 0.5
"""QEMU answers in a millisecond. One that takes longer is busy with something else."""
SHORTEST_S = 0.2
"""Between two looks that make a rate: guests write in bursts, less would only show one of them or none."""
LONGEST_S = 60.0
"""A rate since longer ago says nothing about now."""
ANSWERING = (Phase.STARTING, Phase.RUNNING, Phase.PAUSED, Phase.STOPPING)


class Traffic(NamedTuple):
    """Of one VM; empty for one that says nothing."""

    disks: tuple[DiskUsage, ...] = ()
    nics: tuple[NicUsage, ...] = ()


class _Look(NamedTuple):
    """``pid``: counters begin anew with each process."""

    at: float
    pid: int | None
    stats: Stats


class TrafficMeter:
    """Remembers the last look at each VM."""

    def __init__(self, engine: Engine, rt: Runtime) -> None:
        self._engine, self._rt = engine, rt
        self._looks: dict[str, _Look] = {}

    async def look(self, vms: Sequence[Vm]) -> list[Traffic]:
        """Of each VM, in their order; takes no longer than :data:`PATIENCE_S`."""
        asking = [asyncio.create_task(self._ask(vm)) for vm in vms]
        if asking:
            _, late = await asyncio.wait(asking, timeout=PATIENCE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        here = {vm.meta.id for vm in vms}
        self._looks = {id: look for id, look in self._looks.items() if id in here}
        return [
            Traffic() if task.cancelled() else self._since_before(vm, task.result())
            for vm, task in zip(vms, asking, strict=True)
        ]

    async def _ask(self, vm: Vm) -> _Look | None:
        if vm.status.phase in ANSWERING:
            with suppress(CorralError):  # it has just ended, or is silent: others tell that
                stats = await self._engine.stats(vm.meta.id)
                return _Look(self._rt.clock.monotonic(), vm.status.pid, stats)
        return None

    def _since_before(self, vm: Vm, now: _Look | None) -> Traffic:
        if now is None:
            return Traffic()
        before = self._looks.get(vm.meta.id)
        since = None if before is None or before.pid != now.pid else now.at - before.at
        if since is None or since >= SHORTEST_S:
            self._looks[vm.meta.id] = now
        if before is None or since is None or not SHORTEST_S <= since <= LONGEST_S:
            before, since = None, None
        drives = {one.name: one for one in before.stats.drives} if before else {}
        cards = {one.name: one for one in before.stats.cards} if before else {}
        return Traffic(
            tuple(_disk(one, drives.get(one.name), since) for one in now.stats.drives),
            tuple(_nic(one, cards.get(one.name), since) for one in now.stats.cards),
        )


def _disk(now: DriveStats, before: DriveStats | None, since: float | None) -> DiskUsage:
    then, since = before or now, None if before is None else since
    return DiskUsage(
        name=now.name, read=now.read, written=now.written, reads=now.reads, writes=now.writes, flushes=now.flushes,
        failed=now.failed, read_rate=_rate(now.read, then.read, since),
        write_rate=_rate(now.written, then.written, since),
        iops=_rate(now.reads + now.writes, then.reads + then.writes, since),
    )  # fmt: skip


def _nic(now: CardStats, before: CardStats | None, since: float | None) -> NicUsage:
    then, since = before or now, None if before is None else since
    return NicUsage(
        name=now.name, received=now.received, sent=now.sent, receive_rate=_rate(now.received, then.received, since),
        send_rate=_rate(now.sent, then.sent, since),
    )  # fmt: skip


def _rate(now: int | None, before: int | None, since: float | None) -> float | None:
    """A second; a counter that went back (a new process under an old pid) has no rate."""
    if now is None or before is None or since is None or now < before:
        return None
    return (now - before) / since
