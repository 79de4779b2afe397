"""Follows the governor's reports: adds up each VM's CPU time, remembers the last seconds, tells who is short for long.

The sums begin with this process. They are what `/metrics` counts; the last seconds are what `corral vm explain` looks
at, because a single second says little.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from corral.agent.events import EventLog
from corral.agent.picture import Picture
from corral.agent.ports import Governing
from corral.governor.protocol import Report, VmReport
from corral.model import Vm
from corral.runtime import Runtime
from corral.scheduler.shortage import Look, Shortage, due

EVERY_S = 1.0
"""The governor's own period."""
LONGEST_S = 5.0
"""A report stands for the time since the one before, but for no more than this: longer ago there was no governor."""
LOOKS = 16
"""Reports remembered of each VM: a quarter of a minute."""


class Sums(NamedTuple):
    """Of one VM: ``seconds`` observed; the others in core-seconds."""

    seconds: float = 0.0
    entitled: float = 0.0
    granted: float = 0.0
    used: float = 0.0
    wanted: float = 0.0
    wait: float = 0.0
    throttled: float = 0.0

    def plus(self, said: VmReport, since_s: float) -> Sums:
        rates = (1.0, said.entitled, said.granted, said.used, said.demand, said.wait, said.throttled)
        return Sums(*(total + rate * since_s for total, rate in zip(self, rates, strict=True)))


class _Account:
    """One VM's."""

    def __init__(self) -> None:
        self.sums = Sums()
        self.recent: deque[Sums] = deque([self.sums], LOOKS)
        self.shortage = Shortage()


class Accounts:
    """Of all VMs of one host. Run one."""

    def __init__(self, picture: Picture, governing: Governing, events: EventLog, rt: Runtime) -> None:
        self._picture, self._governing, self._events, self._rt = picture, governing, events, rt
        self._accounts: dict[str, _Account] = {}
        self._at: float | None = None

    async def run(self) -> None:
        """Take in every report, until cancelled."""
        while True:
            report = self._governing.report()
            if report is not None and report.at != self._at:
                self._take(report)
            await self._rt.clock.sleep(EVERY_S)

    def sums(self, vm_id: str) -> Sums | None:
        """Since this process first heard of the VM; None before that."""
        account = self._accounts.get(vm_id)
        return None if account is None else account.sums

    def lately(self, vm_id: str) -> Sums | None:
        """The last seconds: averages in cores, ``seconds`` as they are. None while nothing is known."""
        account = self._accounts.get(vm_id)
        if account is None:
            return None
        first, last = account.recent[0], account.recent[-1]
        seconds = last.seconds - first.seconds
        if seconds <= 0:
            return None
        rates = [(after - before) / seconds for before, after in zip(first[1:], last[1:], strict=True)]
        return Sums(seconds, *rates)

    def _take(self, report: Report) -> None:
        since = report.period_s if self._at is None else report.at - self._at
        if not 0 < since <= LONGEST_S:  # another governor, or a long pause
            since = report.period_s
        self._at = report.at
        gone = self._accounts.keys() - {said.id for said in report.vms} - self._picture.alive
        for id in gone:
            del self._accounts[id]
        for said in report.vms:
            account = self._accounts.setdefault(said.id, _Account())
            account.sums = account.sums.plus(said, since)
            account.recent.append(account.sums)
            vm = self._picture.vms.get(said.id)
            if vm is not None:
                self._judge(vm, account, report, said, since)

    def _judge(self, vm: Vm, account: _Account, report: Report, said: VmReport, since_s: float) -> None:
        most = float(vm.spec.cpu.count) if vm.spec.cpu.limit is None else vm.spec.cpu.limit
        should = due(said.entitled, min(most, said.demand), report.cores, report.foreign)
        look = Look(since_s, should, said.used, said.wait, said.throttled)
        account.shortage, changes = account.shortage.after(look)
        for change in changes:
            self._events.emit(vm, change.reason, change.sentence(), "info" if change.over else "warning")
