"""Finding a machine on the host again: from the record, or from its process when the record is behind or lost."""

from __future__ import annotations

from pathlib import Path

import msgspec

from corral.engine.protocol import Machine
from corral.engine.qemu.record import Record, RunDir
from corral.errors import Unavailable
from corral.runtime import Runtime, process
from corral.runtime.process import boot_id

_LOOKS, _PAUSE = 40, 0.05
"""A process that holds the lock shows its arguments after its exec, which a loaded host may delay (at most 2 s)."""


async def read_trace(run: RunDir, rt: Runtime, *, thorough: bool) -> Record | None:
    """What is known of a machine: its record, completed from its process. None when there is no trace at all.

    ``thorough``: when its directory is missing look through all processes for it, too (some 10 ms).
    Raises Unavailable when a process is there that cannot be identified (nothing may be started or deleted then).
    """
    if not run.path.exists():
        return _lost_directory(run) if thorough else None
    record = run.read()
    if record is not None and _named(record):
        return record
    if not run.has_process():
        return record or Record(machine=_unknown(run.id), boot_id=boot_id(), accelerator="")
    for _ in range(_LOOKS):
        if (pid := find_process(run)) is not None and (now := process.stat(pid)) is not None:
            base = record or Record(machine=_unknown(run.id), boot_id=boot_id(), accelerator=_accelerator(pid))
            found = msgspec.structs.replace(
                base, boot_id=boot_id(), pid=pid, start=now.start, started_at=rt.clock.now(), exit=None
            )
            run.write(found)
            return found
        if not run.has_process():
            return record or Record(machine=_unknown(run.id), boot_id=boot_id(), accelerator="")
        await rt.clock.sleep(_PAUSE)
    raise Unavailable(f"a process of machine {run.id} is there and cannot be identified", code="unresponsive")


def find_process(run: RunDir) -> int | None:
    """The process of this machine: it has ``-uuid ID`` among its arguments and stands in the machine's directory."""
    places = (str(run.path), f"{run.path} (deleted)")
    for pid in process.with_arguments(b"-uuid", run.id.encode()):
        if process.working_directory(pid) in places:
            return pid
    return None


def find_lost(root: Path) -> set[str]:
    """Ids of machines whose process stands in a directory under ``root`` that was deleted."""
    found = set()
    for pid in process.pids():
        place = process.working_directory(pid)
        if place.startswith(f"{root}/") and place.endswith("/run (deleted)"):
            arguments = process.command_line(pid)
            if b"-uuid" in arguments[:-1]:
                found.add(arguments[arguments.index(b"-uuid") + 1].decode(errors="replace"))
    return found


def _named(record: Record) -> bool:
    """The record says all: its process was recorded, or its end was, or the host was booted since."""
    return record.pid is not None or record.exit is not None or record.boot_id != boot_id()


def _lost_directory(run: RunDir) -> Record | None:
    """Somebody deleted the directory under a running machine: it can still be seen and killed."""
    pid = find_process(run)
    now = process.stat(pid) if pid is not None else None
    if pid is None or now is None:
        return None
    return Record(machine=_unknown(run.id), boot_id=boot_id(), accelerator=_accelerator(pid), pid=pid, start=now.start)


def _accelerator(pid: int) -> str:
    return "kvm" if b"kvm" in process.command_line(pid) else "tcg"


def _unknown(id: str) -> Machine:
    return Machine(id=id, name="", memory=0)
