"""The QEMU engine: the machines of one host, found again after any crash of the daemon.

Truth is on the host, in this order: the lock that QEMU holds, the process (pid, start time, ``-uuid`` in its
arguments), the record beside it. The daemon's memory is only a cache of that. Calls for one machine that start or end
its process go one after the other; a silent machine delays nobody else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import structlog

from corral.engine.protocol import (
    Capabilities,
    Channels,
    Drive,
    EngineEvent,
    Limits,
    Machine,
    MemorySight,
    Sighting,
    State,
    Stats,
    Template,
)
from corral.engine.qemu.adopt import find_lost, read_trace
from corral.engine.qemu.command import check
from corral.engine.qemu.fork.freeze import Ground, finish, settle, stand_still
from corral.engine.qemu.fork.shelf import Kept, Shelf
from corral.engine.qemu.fork.templates import Templates
from corral.engine.qemu.launcher import Privileges, check_ports, choose_uid, spawn
from corral.engine.qemu.machine import QemuMachine
from corral.engine.qemu.memory import GUEST_STATS, POLLING, sight_of
from corral.engine.qemu.prepare import prepare
from corral.engine.qemu.probe import probe
from corral.engine.qemu.qmp import Verb
from corral.engine.qemu.record import Record, RunDir
from corral.engine.qemu.stats import stats_of
from corral.engine.qemu.take import take
from corral.engine.qemu.throttle import setting
from corral.errors import CorralError, NotFound, Refused, Unavailable, from_system
from corral.runtime import Runtime, process
from corral.runtime.process import boot_id

log = structlog.get_logger("engine")
START_DEADLINE = 60.0
"""From exec to QMP's greeting: 20 ms on an idle host; 15 s were exceeded on one that wrote gigabytes meanwhile."""


class QemuEngine:
    """Implements :class:`corral.engine.protocol.Engine`.

    Args:
        root: ``CORRAL_STATE/vms``.
        state: ``CORRAL_STATE``, where the probe's answer is kept.
    """

    def __init__(self, root: Path, state: Path, rt: Runtime) -> None:
        self._root, self._state, self._rt = root, state, rt
        self._machines: dict[str, QemuMachine] = {}
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}
        self._pending: dict[tuple[str, str], EngineEvent] = {}
        self._woken = asyncio.Event()
        self._probing = asyncio.Lock()
        self._capabilities: Capabilities | None = None
        self._ground = Ground(Shelf(state / "templates"), rt, state)
        self._templates = Templates(self._ground.shelf, self._accelerator)
        self._sweeping = asyncio.Lock()
        self._freezing: set[asyncio.Task[Template]] = set()
        self._swept = False
        self._using: list[str] = []
        """Templates of the forks that are being started."""

    async def probe(self, *, again: bool = False) -> Capabilities:
        async with self._probing:
            if self._capabilities is None or again:
                found = await probe(self._state, self._rt, again=again)
                self._capabilities = msgspec.structs.replace(found, confinement=str(Privileges.here()))
            return self._capabilities

    async def _accelerator(self) -> str:
        return (await self.probe()).accelerator

    async def inventory(self) -> list[Sighting]:
        ids = {path.parent.name for path in self._root.glob("*/run")}
        for id in await asyncio.to_thread(find_lost, self._root):
            await self._find(id, thorough=True)
        ids |= {id for id, machine in self._machines.items() if machine.alive}
        seen = await asyncio.gather(*(self._inspect_any(id) for id in sorted(ids)))
        return [one for one in seen if one.state is not State.ABSENT]  # warm ones are nobody's

    async def _inspect_any(self, id: str) -> Sighting:
        """Like inspect, for one of many: something is there, and if it cannot be identified that is the answer."""
        try:
            return await self.inspect(id)
        except Unavailable:
            return Sighting(id=id, state=State.UNRESPONSIVE)

    async def inspect(self, id: str) -> Sighting:
        machine = await self._find(id)
        if machine is None or machine.record.warm:
            return Sighting(id=id, state=State.ABSENT)
        seen = await machine.sight()
        if machine.record.freezing is None or seen.pid is None or seen.state is State.UNRESPONSIVE or id in self._locks:
            return seen
        async with self._alone(id):  # nobody is at it any more: an attempt to freeze it was given up half-way
            try:
                await settle(machine, self._ground.shelf)
            except CorralError as error:
                log.info("an attempt to freeze is not settled yet", vm=id, reason=error.message)
        return await machine.sight()

    async def create(self, machine: Machine, *, warm: bool = False) -> Sighting:
        check(machine)
        accelerator = (await self.probe()).accelerator
        async with self._alone(machine.id):
            known = await self._find(machine.id, thorough=True)
            if known is not None and known.record.warm:
                if warm and await self._taken(known, machine):
                    return await known.sight()
                await self._end(known)
                known = None
            if known is not None and known.alive:
                return await known.sight()
            if known is not None:
                await known.close()
            return await self._start(machine, accelerator)

    async def _taken(self, known: QemuMachine, machine: Machine) -> bool:
        """Whether a warm one has become this machine. Raises what stands against the machine itself."""
        check_ports(machine)
        if machine.template is not None:
            await self._templates.fitting(machine)
        return known.alive and await take(known, machine, self._rt)

    async def warm(self, machine: Machine, rehearse: Callable[[], Awaitable[None]] | None = None) -> Sighting:
        check(machine)
        if machine.template is None or any(card.forwards for card in machine.cards):
            raise Refused("only a fork without ports can be made ahead", code="unsupported")
        accelerator = (await self.probe()).accelerator
        async with self._alone(machine.id):
            known = await self._find(machine.id, thorough=True)
            if known is None:
                seen = await self._start(machine, accelerator, warm=True)
                made = self._machines[machine.id]
                await self._unplug(made)
                made.save(unplugged=True)
                if rehearse is not None:
                    await self._rehearse(made, rehearse)
                return seen
            if not (known.alive and known.record.warm):
                raise Refused(f"there is a machine {machine.id} already", code="in-use")
            return await known.sight()

    async def _rehearse(self, made: QemuMachine, rehearse: Callable[[], Awaitable[None]]) -> None:
        """Let it run for a moment. One that is found running was left in the middle of that, and is not taken."""
        await made.command(Verb.CONTINUE)
        await self._rt.faults.at("engine.warm.running")
        await rehearse()
        await made.command(Verb.STOP)

    async def pool(self) -> list[Sighting]:
        found = [await self._find(path.parent.name) for path in self._root.glob("*/run")]
        return [await one.sight() for one in found if one is not None and one.record.warm]

    async def _start(self, machine: Machine, accelerator: str, *, warm: bool = False) -> Sighting:
        if machine.template is None:
            return await self._spawn(machine, accelerator, None)
        self._using.append(machine.template)
        try:
            return await self._spawn(machine, accelerator, await self._templates.fitting(machine), warm=warm)
        finally:
            self._using.remove(machine.template)

    async def _spawn(self, machine: Machine, accelerator: str, kept: Kept | None, *, warm: bool = False) -> Sighting:
        run = RunDir(self._root, machine.id)
        check_ports(machine)
        run.make()
        await self._rt.faults.at("engine.spawn.dir")
        privileges = Privileges.here()
        uid = choose_uid(machine.id, self._uids(but=machine.id)) if privileges.separate_users else None
        record = Record(
            machine=machine, boot_id=boot_id(), accelerator=accelerator, uid=uid, fresh=machine.template is not None,
            warm=warm,
        )  # fmt: skip
        run.write(record)

        def start() -> int:
            told = partial(prepare, machine, run, uid=uid, accelerator=accelerator, privileges=privileges)
            if kept is None:
                return spawn(told())
            with self._templates.opened(kept) as warm:
                return spawn(told(warm=warm, variables=self._templates.variables(kept)))

        try:
            # Not cancelled half-way: a started process and the descriptors it needs belong to the thread.
            pid = await asyncio.shield(asyncio.to_thread(start))
            await self._rt.faults.at("engine.spawn.process")
        except CorralError:
            if not run.has_process():
                run.remove()
            raise
        started = process.stat(pid)
        made = QemuMachine(run, record, self._rt, self._publish)
        made.save(pid=pid, start=started.start if started else 0, started_at=self._rt.clock.now())
        await self._rt.faults.at("engine.spawn.recorded")
        self._machines[machine.id] = made
        made.watch()
        return await self._greet(made)

    async def _greet(self, made: QemuMachine) -> Sighting:
        """Wait until the new QEMU answers, and has its state if it is a fork.

        One that ended or stays silent leaves nothing behind but its last words.
        """
        try:
            await made.loaded(START_DEADLINE)
            if made.record.fresh:
                await self._rt.faults.at("engine.fork.loaded")
        except Unavailable as error:
            # It may be about to end: its socket closes a moment before the process is gone.
            doing = made.doing()
            try:
                async with asyncio.timeout(1.0):
                    await made.gone.wait()
            except TimeoutError:
                await made.kill()
            words = made.run.last_words()
            await self._forget(made)
            if "host forwarding rule" in words:
                raise Refused(words.splitlines()[-1], code="in-use", field="ports") from error
            last = words.splitlines()[-1] if words else f"{error.message}; its process {doing}"
            raise CorralError(f"QEMU did not start: {last}", code="engine", last_words=words) from error
        return await made.sight()

    async def resume(self, id: str) -> None:
        async with self._alone(id):
            machine = await self._known(id)
            if machine.record.fresh:
                if not machine.record.unplugged:
                    await self._unplug(machine)
                await self._rt.faults.at("engine.fork.unplugged")
                machine.save(fresh=False)
            await machine.command(Verb.CONTINUE)

    async def _unplug(self, fork: QemuMachine) -> None:
        """Pull out its cables: what was loaded has them plugged in."""
        await fork.loaded(START_DEADLINE)
        for card in fork.record.machine.cards:
            await fork.command(Verb.SET_LINK, {"name": f"nic-{card.name}", "up": False})

    async def pause(self, id: str) -> None:
        async with self._alone(id):
            await (await self._known(id)).command(Verb.STOP)

    async def reset(self, id: str) -> None:
        async with self._alone(id):
            machine = await self._known(id)
            panicked = (await machine.sight()).state is State.PANICKED
            await machine.command(Verb.RESET)
            if panicked:  # a panic stopped the CPUs; a real reset button would have them run
                await machine.command(Verb.CONTINUE)

    async def powerdown(self, id: str) -> None:
        await (await self._known(id)).command(Verb.POWERDOWN)

    async def kill(self, id: str) -> None:
        async with self._alone(id):
            machine = await self._find(id, thorough=True)
            if machine is not None:
                await machine.kill()

    async def remove(self, id: str) -> None:
        async with self._alone(id):
            machine = await self._find(id, thorough=True)
            if machine is not None and machine.record.warm:
                await self._end(machine)
            elif machine is not None and machine.alive:
                raise Refused(f"machine {id} still runs", code="in-use", hint="kill it first")
            elif machine is not None:
                await self._forget(machine)
            RunDir(self._root, id).remove()

    async def _end(self, warm: QemuMachine) -> None:
        """Have nothing left of a warm one."""
        await warm.kill()
        await self._forget(warm)

    async def _forget(self, machine: QemuMachine) -> None:
        await machine.close()
        self._machines.pop(machine.id, None)
        machine.run.remove()

    async def link(self, id: str, card: str, up: bool) -> None:
        machine = await self._known(id)
        if card not in {one.name for one in machine.record.machine.cards}:
            raise NotFound(f"machine {id} has no card {card}")
        await machine.command(Verb.SET_LINK, {"name": f"nic-{card}", "up": up})

    async def drives(self, id: str) -> tuple[Drive, ...]:
        async with self._alone(id):
            machine = await self._known(id)
            await settle(machine, self._ground.shelf)
            return machine.record.machine.drives

    async def hardware(self, machine: Machine) -> str:
        return await self._templates.hardware(machine)

    async def freeze(self, id: str, template: str, overlays: Mapping[str, Drive]) -> Template:
        # To its end whatever becomes of the caller: threads are at work with another process's memory.
        work = asyncio.create_task(self._freeze(id, template, overlays), name=f"freeze-{template}")
        self._freezing.add(work)
        work.add_done_callback(self._freezing.discard)
        return await asyncio.shield(work)

    async def _freeze(self, id: str, template: str, overlays: Mapping[str, Drive]) -> Template:
        try:
            return await self._freeze_alone(id, template, overlays)
        except OSError as error:
            raise from_system(f"template {template} cannot be made", error, code="engine") from error

    async def _freeze_alone(self, id: str, template: str, overlays: Mapping[str, Drive]) -> Template:
        await self._sweep()
        async with self._alone(f"template {template}"):
            known = await self._templates.find(template)
            if known is not None:
                return known
            async with self._alone(id):
                machine = await self._known(id)
                pause, overlays = await stand_still(self._ground, machine, template, overlays)
            try:
                hardware = await self._templates.hardware(machine.record.machine)
                gid = None if machine.record.uid is None else choose_uid(template, self._uids(but=""))
                return await finish(self._ground, machine, template, overlays, pause, hardware=hardware, gid=gid)
            finally:
                if pause.memory is not None:
                    os.close(pause.memory)

    async def _sweep(self) -> None:
        """Once: a daemon before this one may have been killed in the middle of something."""
        async with self._sweeping:
            if not self._swept:
                await asyncio.to_thread(self._ground.shelf.sweep, lambda id: RunDir(self._root, id).has_process())
            self._swept = True

    async def templates(self) -> list[Template]:
        await self._sweep()
        return await self._templates.all()

    async def discard(self, template: str) -> None:
        async with self._alone(f"template {template}"):
            users = sum(seen.template == template for seen in await self.inventory()) + self._using.count(template)
            if users:
                raise Refused(
                    f"template {template} is used by {users} running machines", code="in-use", hint="stop them first"
                )
            for warm in await self.pool():
                if warm.template == template:
                    await self._end_if_warm(warm.id)
            await asyncio.to_thread(self._ground.shelf.remove, template)

    async def _end_if_warm(self, id: str) -> None:
        async with self._alone(id):
            machine = await self._find(id)
            if machine is not None and machine.record.warm:
                await self._end(machine)

    async def listens(self, id: str) -> bool:
        rows = await (await self._known(id)).command(Verb.CHANNELS)
        return any(row["label"] == "guest" and row["frontend-open"] for row in rows)

    async def vcpus(self, id: str) -> tuple[int, ...]:
        machine = await self._known(id)
        rows = await machine.command(Verb.CPUS)
        assert machine.record.pid is not None
        outer = process.threads(machine.record.pid)  # QEMU knows the numbers of its own pid namespace
        numbers = [row["thread-id"] for row in sorted(rows, key=lambda row: row["cpu-index"])]
        return tuple(outer[number] for number in numbers if number in outer)

    async def stats(self, id: str) -> Stats:
        machine = await self._known(id)
        return stats_of(machine.record.machine, await machine.command(Verb.BLOCK_STATS))

    async def memory(self, id: str) -> MemorySight:
        machine = await self._known(id)
        state = await machine.command(Verb.BALLOON_STATE)
        said = await machine.command(Verb.GET, {**GUEST_STATS})
        return sight_of(machine.record.machine, state, said)

    async def poll_memory(self, id: str, every_s: int) -> None:
        await (await self._known(id)).command(Verb.SET, {**POLLING, "value": every_s})

    async def balloon(self, id: str, target: int) -> None:
        await (await self._known(id)).command(Verb.BALLOON, {"value": target})

    async def throttle(self, id: str, drive: str, limits: Limits) -> None:
        machine = await self._known(id)
        if drive not in {one.name for one in machine.record.machine.drives}:
            raise NotFound(f"machine {id} has no drive {drive[:40]!a}")
        await machine.command(Verb.SET, setting(drive, limits))

    def channels(self, id: str) -> Channels:
        run = RunDir(self._root, id)
        return Channels(serial=run.socket("serial"), guest=run.socket("guest"), qga=run.socket("qga"))

    async def events(self) -> AsyncIterator[EngineEvent]:
        while True:
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
            self._woken.clear()
            await self._woken.wait()

    def _publish(self, event: EngineEvent) -> None:
        # One of a kind per machine waits at most: a guest that resets itself in a loop cannot fill memory.
        self._pending[event.id, event.kind] = event
        self._woken.set()

    async def close(self) -> None:
        await asyncio.gather(*self._freezing, return_exceptions=True)
        if not any(RunDir(self._root, path.parent.name).has_process() for path in self._root.glob("*/run")):
            await asyncio.to_thread(self._ground.shelf.unload)  # a host without VMs and daemon is left as it was found
        await asyncio.gather(*(machine.close() for machine in self._machines.values()))
        self._machines.clear()

    def _uids(self, *, but: str) -> set[int]:
        """Users of all other machines here, running or not, and groups of templates: all are taken."""
        found = {made.record.uid for id, made in self._machines.items() if id != but}
        for path in self._root.glob("*/run"):
            id = path.parent.name
            if id != but and id not in self._machines and (record := RunDir(self._root, id).read()) is not None:
                found.add(record.uid)
        return {uid for uid in found if uid is not None} | self._ground.shelf.gids()

    async def _known(self, id: str) -> QemuMachine:
        machine = await self._find(id)
        if machine is None or not machine.alive or machine.record.warm:
            raise Refused(f"machine {id} does not run", code="wrong-phase")
        return machine

    async def _find(self, id: str, *, thorough: bool = False) -> QemuMachine | None:
        """The machine as memory or, after a restart of the daemon, the host knows it."""
        if id in self._machines:
            return self._machines[id]
        run = RunDir(self._root, id)
        record = await read_trace(run, self._rt, thorough=thorough)
        # Somebody else may have found it while we waited: there must be one object per machine (one QMP client).
        if record is None or id in self._machines:
            return self._machines.get(id)
        machine = QemuMachine(run, record, self._rt, self._publish)
        self._machines[id] = machine
        if not machine.watch():
            machine.bury()
        return machine

    @asynccontextmanager
    async def _alone(self, id: str) -> AsyncIterator[None]:
        """One at a time per machine (or template); the lock is forgotten when nobody wants it."""
        lock, users = self._locks.setdefault(id, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[id]
