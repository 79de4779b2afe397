"""Making a template of a machine that runs, and goes on running: the procedure.

While it runs: its template's memory (if it is a fork itself) is copied, then the pages of its own, then those it wrote
meanwhile, until few are left. Then it stands still: the devices' state is saved, the last pages are copied, and, last,
all disks are switched to their overlays in one transaction. So a machine whose disks are switched has been frozen
completely, whatever became of the daemon: the memory is with the holder, the state in a file. Then it goes on, and what
is left (:func:`finish`) has time.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from corral.engine.overlays import check_overlays, frozen, switched
from corral.engine.protocol import Drive, State, Template
from corral.engine.qemu.command import disk_node
from corral.engine.qemu.fork import ram
from corral.engine.qemu.fork.pages import Memory, Unreadable, total
from corral.engine.qemu.fork.shelf import Kept, Shelf
from corral.engine.qemu.fork.watch import Unwatchable
from corral.engine.qemu.launcher import own
from corral.engine.qemu.machine import QemuMachine
from corral.engine.qemu.qmp import Verb
from corral.engine.qemu.record import Freezing
from corral.errors import CorralError, Refused
from corral.runtime import Runtime

_ROUNDS, _FEW = 4, 2 << 20
"""Looks for what was written meanwhile before the pause, and bytes that are few enough to be left to it."""
_END_S = 1.0
"""Between the loss of its QMP socket and the end of a process."""
_SLOW_S = 15.0
"""Deadline of commands that may have to wait for a disk."""
MAX_STATE = 16 << 20
"""Bytes of devices' state: 130 to 430 kB as a rule."""
_log = structlog.get_logger()


class Pause(NamedTuple):
    """What the machine noticed of it, and what came of it."""

    seconds: float | None
    """None: nobody was there to see its end."""
    copied: int
    """Bytes of memory."""
    memory: int | None
    """The new memory, if it is not only with the holder. Whoever has the pause closes it."""


def node_of(drive: str, template: str) -> str:
    """The block node of a drive's overlay (QEMU takes 31 characters)."""
    return f"{drive}-{template[:8]}"


async def is_switched(machine: QemuMachine, template: str, overlays: Mapping[str, Drive]) -> bool:
    """The disks have been switched for this template: the overlays have something under them."""
    nodes = {node["node-name"]: node for node in await _nodes(machine, flat=False)}
    found = [nodes.get(node_of(name, template)) for name in overlays]
    return bool(found) and all(node is not None and node["backing_file_depth"] > 0 for node in found)


async def settle(machine: QemuMachine, shelf: Shelf) -> bool:
    """Bring an attempt to freeze it to an end, whoever left it in the middle: it runs, and its record says what it
    writes to. May be repeated until it answers.

    True: it was switched, so that the template can be finished. Else nothing is left of the attempt.
    """
    freezing = machine.record.freezing
    if freezing is None:
        return False
    done = await is_switched(machine, freezing.template, freezing.overlays)
    if (await machine.command(Verb.STATUS))["status"] == "paused":
        await machine.command(Verb.CONTINUE)
    if done:
        _is_frozen(machine, freezing)
        return True
    ours = {node_of(name, freezing.template) for name in freezing.overlays}
    for left in {node["node-name"] for node in await _nodes(machine)} & ours:
        await machine.command(Verb.REMOVE_NODE, {"node-name": left})
    await asyncio.to_thread(shelf.remove, freezing.template)
    machine.run.state(freezing.template).unlink(missing_ok=True)
    machine.save(freezing=None)
    return False


def _is_frozen(machine: QemuMachine, freezing: Freezing) -> None:
    """It has been frozen, and runs: have its record say what it writes to."""
    tops = {name: node_of(name, freezing.template) for name in freezing.overlays}
    now = switched(machine.record.machine, freezing.overlays)
    machine.save(freezing=None, machine=now, tops=machine.record.tops | tops)


async def _nodes(machine: QemuMachine, *, flat: bool = True) -> list[dict[str, Any]]:
    """Its block nodes; ``flat``: without what is known of the nodes under each."""
    return list(await machine.command(Verb.NODES, {"flat": flat}))


@dataclass(frozen=True)
class Ground:
    """Where templates are made. ``ours``: the state directory."""

    shelf: Shelf
    rt: Runtime
    ours: Path


class Freeze:
    """One attempt. ``base``: the template that the machine was forked from itself."""

    def __init__(
        self, ground: Ground, machine: QemuMachine, id: str, overlays: Mapping[str, Drive], *, base: Kept | None
    ) -> None:
        self.machine, self.id, self.overlays = machine, id, dict(overlays)
        self.uid = machine.record.uid
        self._shelf, self._rt, self._ours, self._base = ground.shelf, ground.rt, ground.ours, base

    async def run(self) -> Pause:
        """Bring the machine to the point where all that is left is :func:`finish`. It runs again afterwards.

        Raises what went wrong; then the machine runs, with the disks it had, and nothing is left of the attempt.
        """
        try:
            size = self.machine.record.machine.memory
            await asyncio.to_thread(self._prepare)
            self.machine.save(freezing=Freezing(template=self.id, overlays=self.overlays))
            await self._open_overlays()
            fd = await asyncio.to_thread(self._base_memory, size)
            try:
                with mmap.mmap(fd, size) as target:
                    return (await self._copy(target))._replace(memory=fd)
            except BaseException:
                os.close(fd)
                raise
        except Unreadable as error:
            await self._give_up()
            raise Refused(f"machine {self.machine.id} cannot be frozen: {error}", code="unsupported") from error
        except BaseException:
            await asyncio.shield(self._give_up())
            raise

    def _prepare(self) -> None:
        """Files: a place, links of the disks, the overlays in the VM's hands, a place for the devices' state."""
        machine = self.machine.record.machine
        self._check_files()
        self._shelf.begin(self.id, machine.id, self.overlays)
        self._shelf.link(self.id, self.overlays, self._ours)
        for overlay in self.overlays.values():
            if self.uid is not None:
                own(overlay.path, self.uid)
            # The pause begins with a flush of everything: leave little to it.
            written = os.open(overlay.layers[0].path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(written)
            finally:
                os.close(written)
        state = self.machine.run.state(self.id)
        state.unlink(missing_ok=True)
        os.close(os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if self.uid is not None:
            own(state, self.uid)

    def _check_files(self) -> None:
        """Refused unless the files under the overlays are those that the machine has open."""
        facts = [path.stat() for path in Path(f"/proc/{self.machine.record.pid}/fd").iterdir() if path.exists()]
        for name, overlay in self.overlays.items():
            try:
                under = overlay.layers[0].path.stat()
                overlay.path.stat()
            except OSError as error:
                raise Refused(f"the overlay of {name} cannot be used: {error}", field="overlays") from error
            if not any(os.path.samestat(under, one) for one in facts):
                raise Refused(f"{overlay.layers[0].path} is not what the machine has open as {name}", field="overlays")

    async def _open_overlays(self) -> None:
        """QEMU opens them beforehand: files are opened in their own time, switching is a matter of pointers."""
        for name, overlay in self.overlays.items():
            discard = self.machine.record.machine.template is None
            form = disk_node(overlay, node=node_of(name, self.id), discard=discard, layers=False)
            await self.machine.command(Verb.ADD_NODE, form, timeout=_SLOW_S)

    def _base_memory(self, size: int) -> int:
        """The new memory, with the holder: what the machine's own template has, or nothing."""
        fd = ram.make(size)
        try:
            if self._base is not None:
                base = self._shelf.memory(self._base)
                try:
                    ram.copy(base, fd)
                finally:
                    os.close(base)
            self._shelf.keeper.put(self.id, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def _copy(self, target: mmap.mmap) -> Pause:
        record, pidfd = self.machine.record, self.machine.pidfd
        assert record.pid is not None
        with Memory(record.pid, pidfd, record.machine.memory) as memory:
            watched = await asyncio.to_thread(self._copy_ahead, memory, target)
            await self._rt.faults.at("engine.freeze.prepared")
            return await self._stand_still(memory, target, watched)

    def _copy_ahead(self, memory: Memory, target: mmap.mmap) -> bool:
        """Copy while it runs; False where writes cannot be noted, so that everything is left to the pause."""
        try:
            memory.watch()
        except Unwatchable as error:
            _log.info("memory cannot be watched", machine=self.machine.id, reason=str(error))
            return False
        if self._base is None:
            memory.copy_sparse(memory.own(), target)
        else:
            memory.copy(memory.own(), target)
        for _ in range(_ROUNDS):
            runs = memory.written()
            memory.copy(runs, target)
            if total(runs) < _FEW:
                break
        return True

    async def _stand_still(self, memory: Memory, target: mmap.mmap, watched: bool) -> Pause:
        machine, clock = self.machine, self._rt.clock
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": self._top(name), "overlay": node_of(name, self.id)}}
            for name in self.overlays
        ]
        machine.hold = True
        began = clock.monotonic()
        try:
            await machine.command(Verb.STOP, timeout=_SLOW_S)
            await machine.command(Verb.SAVE_DEVICES, {"filename": str(machine.run.state(self.id)), "live": False})
            copied = await asyncio.to_thread(self._copy_last, memory, target, watched)
            await self._rt.faults.at("engine.freeze.copied")
            if actions:
                await machine.command(Verb.TRANSACTION, {"actions": actions}, timeout=_SLOW_S)
            await self._rt.faults.at("engine.freeze.switched")
        finally:
            try:
                await machine.command(Verb.CONTINUE)
            finally:
                machine.hold = False
        seconds = clock.monotonic() - began
        _is_frozen(machine, Freezing(template=self.id, overlays=self.overlays))
        return Pause(seconds, copied, None)

    def _copy_last(self, memory: Memory, target: mmap.mmap, watched: bool) -> int:
        runs = memory.written() if watched else memory.own()
        memory.copy(runs, target)
        if self.machine.record.machine.firmware == "uefi":
            variables = self._shelf.place(self.id) / "nvram.fd"
            variables.touch(mode=0o600)
            shutil.copyfile(self.machine.run.variables, variables)
        return total(runs)

    def _top(self, drive: str) -> str:
        """The node that is written to now."""
        return self.machine.record.tops.get(drive, f"{drive}-format")

    async def _give_up(self) -> None:
        """Nothing is left of the attempt, unless the disks were switched already: then it can be finished.

        A machine that is silent just now is settled when it is looked at again.
        """
        try:
            if self.machine.alive and await settle(self.machine, self._shelf):
                return
        except CorralError as error:
            try:
                async with asyncio.timeout(_END_S):  # it may be about to end
                    await self.machine.gone.wait()
            except TimeoutError:
                _log.warning("an attempt to freeze left something", machine=self.machine.id, reason=error.message)
                return
        await asyncio.to_thread(self._shelf.remove, self.id)
        self.machine.run.state(self.id).unlink(missing_ok=True)


async def stand_still(
    ground: Ground, machine: QemuMachine, id: str, overlays: Mapping[str, Drive]
) -> tuple[Pause, Mapping[str, Drive]]:
    """The part of freezing that the machine notices, and what its disks became.

    Where it was done before, and not finished, nothing is done again: its disks became what they did then.
    """
    await settle(machine, ground.shelf)
    making = ground.shelf.making(id)
    before = overlays if making is None else making.overlays
    if await is_switched(machine, id, before):
        return Pause(None, 0, None), before
    state = (await machine.sight()).state
    if state is not State.RUNNING:
        raise Refused(f"machine {machine.id} is {state}, not running", code="wrong-phase")
    check_overlays(machine.record.machine, overlays)
    parent = machine.record.machine.template
    base = None if parent is None else ground.shelf.read(parent)
    return await Freeze(ground, machine, id, overlays, base=base).run(), overlays


async def finish(
    ground: Ground, machine: QemuMachine, id: str, overlays: Mapping[str, Drive], pause: Pause, *,
    hardware: str, gid: int | None,
) -> Template:  # fmt: skip
    """Make a template of what :meth:`Freeze.run` left, also after another daemon did that. May be repeated."""
    shelf, rt, ours = ground.shelf, ground.rt, ground.ours

    def work() -> Template:
        place = shelf.place(id)
        fd = shelf.keeper.get(id) if pause.memory is None else os.dup(pause.memory)
        if fd is None or not machine.run.state(id).exists():
            raise CorralError(f"template {id} was interrupted and cannot be finished", hint="freeze it as another one")
        try:
            names = shelf.link(id, overlays, ours)
            for layer in names:
                _lock(layer, gid)
            _take(machine.run.state(id), place / "state")
            _save(fd, place / "ram")
            ram.seal(fd)
            shelf.keeper.put(id, fd)  # once more: the holder may be another one
            shown = frozen(machine.record.machine, overlays, names)
            files = [place / "state", place / "ram", *(d.path for d in shown.drives if not d.readonly)]
            return Template(
                id=id, machine=shown, hardware=hardware, memory=shown.memory, made_at=rt.clock.now(), loaded=True,
                disk=sum(path.stat().st_blocks * 512 for path in files), digest=ram.digest(fd),
                pause_s=pause.seconds, copied=pause.copied,
            )  # fmt: skip
        finally:
            os.close(fd)

    try:
        template = await asyncio.to_thread(work)
    except (OSError, CorralError):
        await asyncio.to_thread(shelf.remove, id)
        machine.run.state(id).unlink(missing_ok=True)
        raise
    await rt.faults.at("engine.freeze.finished")
    shelf.finish(Kept(template=template, gid=gid))
    machine.run.state(id).unlink(missing_ok=True)
    await rt.faults.at("engine.freeze.recorded")
    return template


def _lock(path: Path, gid: int | None) -> None:
    """A disk becomes a layer: readable by the template's group, writable by nobody. A layer stays as it is."""
    if not path.stat().st_mode & stat.S_IWUSR:
        return
    if gid is not None:
        os.chown(path, 0, gid)
    path.chmod(0o440 if gid is not None else 0o400)


def _take(source: Path, target: Path) -> None:
    """A copy that is nobody's but ours: QEMU may still hold ``source``, and whoever rules it writes what he likes."""
    given = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(given, "rb") as file:
        if not stat.S_ISREG(os.fstat(given).st_mode):
            raise CorralError(f"{source} is not the file that was made for the devices' state", code="engine")
        state = file.read(MAX_STATE + 1)
    if len(state) > MAX_STATE:
        raise CorralError(
            f"the devices' state is more than {MAX_STATE >> 20} MiB: this machine's QEMU is not sound", code="engine"
        )
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(state)


def _save(memory: int, path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        ram.copy(memory, fd)
    finally:
        os.close(fd)
