"""Writes what is seen into a VM's record: only what changed, only what is the agent's, and an event for each turn."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from corral.agent.events import EventLog
from corral.agent.failure import TABLE, Cause
from corral.agent.picture import Picture
from corral.errors import NotFound, Unavailable, Unknown
from corral.model import Phase, Power, Vm, VmStatus
from corral.store.objects import Objects

TURNS: dict[Phase, tuple[str, str]] = {
    Phase.RUNNING: ("Running", "info"),
    Phase.PAUSED: ("Paused", "info"),
    Phase.STOPPED: ("Stopped", "info"),
    Phase.UNRESPONSIVE: ("Unresponsive", "warning"),
    Phase.ERROR: ("Failed", "error"),
    Phase.UNKNOWN: ("Quarantined", "error"),
}
"""Phases whose beginning is an event: its reason and severity."""


CONSOLE, CONSOLE_SHOWN = 8192, 700
"""Bytes of the serial log looked at, characters told: an event's message has an end (:mod:`corral.agent.events`)."""
TELLING = re.compile(r"Kernel panic|BUG:|Oops:|soft lockup|hard LOCKUP|rcu.*stall|blocked for more than|Out of memory")
"""Lines of Linux that name what went wrong; a long trace may follow them."""
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-_])")


class NotRecorded(Unavailable):
    """The store did not take it, or its answer was lost. Nothing is wrong with the VM: look again, decide anew."""


class VmRecords:
    """The records of this host's VMs, written by compare-and-swap. ``tail``: the last bytes of a VM's serial log."""

    def __init__(self, objects: Objects, picture: Picture, events: EventLog, tail: Callable[[str, int], bytes]) -> None:
        self._objects, self._picture, self._events, self._tail = objects, picture, events, tail

    async def write(self, vm: Vm, *, power: Power | None = None, **status: Any) -> Vm:
        """Set fields of the status, decided from ``vm``; returns the record as it now is.

        Nothing is written when nothing changes, or when the VM was meanwhile given to another host or epoch.
        ``power`` changes the wish itself (a guest that powered off stays off), unless it was changed meanwhile.
        Raises NotFound when the record is gone, NotRecorded when the store cannot be reached.
        """

        def mutate(current: Vm) -> Vm | None:
            if (current.status.host, current.status.epoch) != (vm.status.host, vm.status.epoch):
                return None
            seen = dict(status)
            changed = current
            if power is not None and current.meta.generation == vm.meta.generation and current.spec.power is not power:
                generation = current.meta.generation + 1
                changed = msgspec.structs.replace(
                    current,
                    meta=msgspec.structs.replace(current.meta, generation=generation),
                    spec=msgspec.structs.replace(current.spec, power=power),
                )
                seen["observed"] = generation
            return msgspec.structs.replace(changed, status=msgspec.structs.replace(changed.status, **seen))

        if power is None and msgspec.structs.replace(vm.status, **status) == vm.status:
            return vm
        before = vm.status
        try:
            written = await self._objects.change(Vm, vm.meta.id, mutate)
        except NotFound:
            self._picture.bury(vm.meta.id)
            raise
        except (Unavailable, Unknown) as error:
            raise NotRecorded(error.message, hint=error.hint) from error
        self._picture.put(written)
        self._tell(before, written)
        return written

    def _tell(self, before: VmStatus, vm: Vm) -> None:
        self._tell_cause(before, vm)
        now = vm.status.phase
        if now is Phase.PENDING and before.phase is not now and vm.status.retry_at is not None:
            self._events.emit(vm, "Exited", vm.status.reason, "warning")  # unasked; it will be started again
        if now is before.phase or now not in TURNS:
            return
        reason, severity = TURNS[now]
        if now is Phase.RUNNING and before.phase is Phase.UNRESPONSIVE:
            reason = "Recovered"
        self._events.emit(vm, reason, vm.status.reason, severity)

    def _tell_cause(self, before: VmStatus, vm: Vm) -> None:
        """What befell it is an event of its own, once: however often it is looked at or tried again."""
        cause = vm.status.cause
        if not cause or cause == before.cause:
            return
        row = TABLE[Cause(cause)]
        lines = _last_lines(self._tail(vm.meta.id, CONSOLE)) if row.console else ""
        self._events.emit(vm, row.event, vm.status.reason + (f"\n{lines}" if lines else ""), row.severity)


def _last_lines(tail: bytes) -> str:
    """What the guest said last, for people: whole lines, without colours and other control characters."""
    text = _ESCAPES.sub("", tail.decode(errors="replace")).replace("\r", "")
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    lines = [line.rstrip()[:200] for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if TELLING.search(line)][-2:]
    room, chosen = CONSOLE_SHOWN - sum(len(line) + 1 for line in telling), []
    for line in reversed(lines):
        room -= len(line) + 1
        if room < 0 or line in telling:
            break
        chosen.append(line)
    return "\n".join([*telling, *reversed(chosen)])
