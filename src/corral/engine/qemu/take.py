"""Making a warm machine a VM's: what is the VM's own is given to the process, and then its record says whose it is.

The record is replaced in one step, and last. Before, it is nobody's: whoever comes after a kill finds a warm machine,
which is ended if it is not wanted or will not do. Afterwards it is the VM's, complete. It has rehearsed at most, in
either case, so nothing is lost with it but the time that it took to make.
"""

from __future__ import annotations

import msgspec
import structlog

from corral.engine.hardware import serves
from corral.engine.protocol import Card, Drive, HostForward, Machine, State
from corral.engine.qemu.machine import QemuMachine
from corral.engine.qemu.qmp import Verb
from corral.engine.qemu.throttle import setting
from corral.errors import CorralError
from corral.runtime import Runtime

DEADLINE = 1.0
"""Seconds for each answer: one that is slower than this is no gain over another start."""
log = structlog.get_logger("engine")


async def take(warm: QemuMachine, wanted: Machine, rt: Runtime) -> bool:
    """Whether it is the VM's from now on. If not, nobody can use it any more: it must end."""
    if not serves(warm.record.machine, wanted) or (await warm.sight()).state is not State.CREATED:
        return False
    try:
        for card in wanted.cards:
            for forward in card.forwards:
                await _forward(warm, card, forward)
        for drive, before in zip(wanted.drives, warm.record.machine.drives, strict=True):
            if drive.limits != before.limits:
                await _limit(warm, drive)
        await rt.faults.at("engine.take.given")
        record = msgspec.structs.replace(warm.record, machine=wanted, warm=False)
        warm.run.write(record)
    except (CorralError, OSError) as error:
        log.warning("a warm machine cannot be used", id=warm.id, error=str(error))
        return False
    warm.record = record
    await rt.faults.at("engine.take.recorded")
    return True


async def _forward(warm: QemuMachine, card: Card, forward: HostForward) -> None:
    """Numbers and checked names only: nothing in this line comes from outside as it is."""
    line = f"hostfwd_add net-{card.name} {forward.protocol}:{forward.address}:{forward.host}-:{forward.guest}"
    words = await warm.command(Verb.MONITOR, {"command-line": line}, timeout=DEADLINE)
    if words:
        raise CorralError(str(words).strip(), code="engine")


async def _limit(warm: QemuMachine, drive: Drive) -> None:
    await warm.command(Verb.SET, setting(drive.name, drive.limits), timeout=DEADLINE)
