"""Does one thing to one VM: idempotent, with a fault point after each part, so that a kill anywhere resumes by itself.

What to do is decided in :mod:`corral.agent.reconcile`. The order inside :meth:`Steps.start` is what makes it safe:
ports and the count of boots are durable before a process exists, so whatever is found afterwards can be judged.
"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import msgspec

from corral.agent import forwards
from corral.agent.grants.cpu import ARRIVING_CORES
from corral.agent.groups import disband
from corral.agent.guests import Guests
from corral.agent.machine import has_ssh, hostname_of, machine_of, memory_net, wants_root, wants_seed
from corral.agent.picture import Memory, Picture
from corral.agent.ports import BootFiles, Joined
from corral.agent.progress import TaskBook
from corral.agent.records import VmRecords
from corral.agent.templates.choose import Choice, first_start
from corral.agent.templates.pool import WarmPool
from corral.agent.templates.stock import TemplateStock
from corral.agent.templates.welcome import Welcome
from corral.engine.protocol import Engine, State
from corral.errors import CorralError, NotFound, Refused
from corral.guest.protocol import Identity
from corral.model import Phase, Vm, Volume
from corral.model.vm import Start, start_of
from corral.runtime import Runtime
from corral.storage.seed import Seed
from corral.store.objects import Objects, Remove

PORT_ROUNDS = 3
REMOVE_ROUNDS = 10


class Steps:
    """The things that can be done. ``ssh_key``: Corral's own public key, put into every guest."""

    def __init__(
        self, engine: Engine, joined: Joined, objects: Objects, rt: Runtime,
        *, guests: Guests, book: TaskBook, records: VmRecords, picture: Picture, stock: TemplateStock,
        pool: WarmPool, welcome: Welcome, ssh_key: str,
    ) -> None:  # fmt: skip
        self._stock, self._pool, self._welcome = stock, pool, welcome
        self._engine, self._joined, self._objects, self._rt = engine, joined, objects, rt
        self._guests, self._book, self._records, self._picture = guests, book, records, picture
        self._ssh_key = ssh_key

    async def start(self, vm: Vm, files: BootFiles) -> None:
        """Volume, seed, ports, record, process: a fork's, where a template fits. Its CPUs do not run yet."""
        choice = await self._stock.choice(vm, files)
        try:
            await self._start(vm, files, choice)
        except Refused as error:
            if choice.template is None or vm.spec.template or error.field != "template":
                raise
            # Between our look and its start the template became unusable. A launch is not lost for that.
            self._stock.suspect(choice.template.meta.id)
            why = f"template {choice.template.meta.name} could not be used: {error.message}"
            vm = self._picture.vms.get(vm.meta.id, vm)
            await self._start(vm, files, Choice(why=why))

    async def _start(self, vm: Vm, files: BootFiles, choice: Choice) -> None:
        id, memory = vm.meta.id, self._picture.of(vm.meta.id)
        memory.marks.clear()
        memory.template_wanted = choice.wanted
        told = f"forked from {choice.template.meta.name}" if choice.template else f"it boots: {choice.why}"
        warm = self._pool.holds(id, choice.template)
        # A key takes a process of its own, and so does a disk: one does not wait for the other.
        made, key = await asyncio.gather(
            self._disks(vm, files, choice, told, warm=warm), self._host_key(vm, choice), return_exceptions=True
        )
        if isinstance(made, BaseException):
            raise made
        if isinstance(key, BaseException):
            raise key
        root, seed = made
        self._mark(vm, "disk")
        self._book.step(id, "start", told)
        joins = self._joined.groups.prepare(id)
        if choice.template is not None:  # until it is somebody; then the governor weighs it (see grants/cpu.py)
            self._joined.groups.weight(id, ARRIVING_CORES)
        overhead = (await self._engine.probe()).overhead
        net = memory_net(vm.spec.memory.size, overhead, forked=choice.template is not None)
        self._joined.groups.memory_limit(id, net)  # before there is a process, so that all of its memory is counted
        for last in range(PORT_ROUNDS, 0, -1):
            vm = await self._allot(vm, files, choice)
            await self._rt.faults.at("create.ports")
            template = choice.template.meta.id if choice.template else None
            try:
                machine = machine_of(
                    vm, files, root=root, seed=seed, ports=vm.status.ports, joins=joins, template=template
                )
                seen = await self._engine.create(machine, warm=warm)
                break
            except Refused as error:
                # Somebody was faster at a port between our look and QEMU's bind: look again, choose anew.
                if error.field != "ports" or last == 1:
                    raise
        memory.warm = self._pool.launched(id, choice.template, seen.pid)
        self._mark(vm, "process")
        if choice.template is not None:
            self._stock.used(choice.template.meta.id)
        await self._rt.faults.at("create.spawned")

    async def _host_key(self, vm: Vm, choice: Choice) -> None:
        memory = self._picture.of(vm.meta.id)
        if choice.template is not None and memory.host_key is None:
            memory.host_key = self._pool.key(vm.meta.id) or await self._joined.host_key()

    async def _disks(
        self, vm: Vm, files: BootFiles, choice: Choice, told: str, *, warm: bool
    ) -> tuple[tuple[Path, ...], Path | None]:
        """The layers of its root disk and its seed, as far as its image has use for them."""
        root: tuple[Path, ...] = ()
        seed = None
        if wants_root(files):
            self._book.step(vm.meta.id, "volume", told)
            root = self._joined.disks.layers(vm.meta.id) if warm else await self._root(vm, files, choice)
        await self._rt.faults.at("create.volume")
        if wants_seed(files):
            self._book.step(vm.meta.id, "seed", told)
            seed = await self._joined.disks.ensure_seed(vm.meta.id, self._seed(vm, files), opened=warm)
        await self._rt.faults.at("create.seed")
        return root, seed

    async def _root(self, vm: Vm, files: BootFiles, choice: Choice) -> tuple[Path, ...]:
        """The layers of the VM's root disk, the uppermost first."""
        id, disks = vm.meta.id, self._joined.disks
        if choice.template is None:
            if first_start(vm) and start_of(vm).how == "fork":
                await disks.remove(id)  # it was to be a fork, and never got as far as being somebody
            await disks.ensure_root(id, files, vm.spec.disk.size, new=first_start(vm))
        else:
            drives = self._stock.usable(choice.template.meta.id).machine.drives
            chain = next(drive.chain for drive in drives if drive.name == "root")
            await disks.ensure_fork(id, [layer.path for layer in chain if layer.path != files.disk], None)
            await self._rt.faults.at("fork.disk")
        return disks.layers(id)

    def _mark(self, vm: Vm, step: str) -> None:
        self._picture.of(vm.meta.id).mark(step, self._rt.clock.now() - vm.meta.created)

    async def _allot(self, vm: Vm, files: BootFiles, choice: Choice) -> Vm:
        """Durable before there is a process: ports, the count of boots, and what it is forked from."""
        taken = forwards.taken_by(self._picture.vms.values(), vm.meta.id)
        ports = forwards.allot(vm, taken, self._joined.ports, self._rt.random, ssh=has_ssh(files))
        details = {key: value for key, value in vm.status.details.items() if key != "problem"}
        details["start"] = msgspec.to_builtins(self._how(vm, choice))
        # Somebody wants something new of it: what went wrong before no longer counts.
        failures = vm.status.failures if vm.status.observed == vm.meta.generation else 0
        return await self._records.write(
            vm, phase=Phase.STARTING, reason="", cause="", failures=failures, ports=ports, boots=vm.spec.boots,
            resets=vm.spec.resets, retry_at=None, observed=vm.meta.generation, details=details,
            template=choice.template.meta.name if choice.template else "",
        )  # fmt: skip

    def _how(self, vm: Vm, choice: Choice) -> Start:
        if choice.template is None:
            return Start(how="cold", why=choice.why, done=not first_start(vm))
        template = choice.template
        parent = self._picture.vms.get(template.spec.source)
        source = (parent.meta.name if parent else template.spec.source) if template.spec.source else ""
        return Start(
            how="fork", template=template.meta.name, template_id=template.meta.id, source=source,
            pause_s=template.status.pause_s if source else None,
        )  # fmt: skip

    async def came_up(self, vm: Vm) -> dict[str, Any]:
        """What is to be written of a VM that is up; the first time: that its disk is its own, and how long it took."""
        start, memory = start_of(vm), self._picture.of(vm.meta.id)
        if start.done:
            return {}
        if start.how != "fork":
            self._mark(vm, "answer")
        if memory.template_wanted:
            memory.template_wanted = False
            await self._stock.want(vm)
        done = msgspec.structs.replace(start, done=True, warm=memory.warm, timings=dict(memory.marks))
        return {"details": {**vm.status.details, "start": msgspec.to_builtins(done)}}

    def _seed(self, vm: Vm, files: BootFiles) -> Seed:
        return Seed(
            instance_id=vm.meta.id, hostname=hostname_of(vm), user_data=vm.spec.user_data,
            ssh_keys=keys_of(vm, self._ssh_key), default_user=files.default_user,
        )  # fmt: skip

    def identity(self, vm_id: str) -> Identity:
        """Who a guest is to be after a boot, as of now."""
        now, entropy = self._rt.clock.now(), self._rt.random.token(32)
        vm = self._picture.vms.get(vm_id)
        if vm is None:
            return Identity(time=now, seed=entropy)
        keys = "".join(f"{key.strip()}\n" for key in keys_of(vm, self._ssh_key)).encode()
        return Identity(time=now, seed=entropy, hostname=hostname_of(vm), authorized_keys=keys or None)

    async def join(self, vm: Vm, state: State, files: BootFiles | None) -> None:
        """Listen to the serial line and to the guest of a process that is there, whether new or found."""
        id = vm.meta.id
        await self._joined.consoles.attach(id, self._engine.channels(id).serial)
        booting = state is State.CREATED or vm.status.phase in (Phase.PENDING, Phase.STARTING)
        start = start_of(vm)
        twin = start.how == "fork" and not start.done
        self._guests.ensure(
            id, expected=files is not None and files.agent, booting=booting,
            held=state in (State.PAUSED, State.STALLED), identity=lambda: self.identity(id),
            welcome=functools.partial(self._welcome, id) if twin else None,
        )  # fmt: skip
        if state is State.RUNNING:
            # The answer to a resume may have been lost: what is seen counts, not what we remember having done.
            self._guests.resumed(id)

    async def resume(self, vm: Vm, state: State) -> None:
        id = vm.meta.id
        if state is State.CREATED:
            self._book.step(id, "boot")
        await self._engine.resume(id)
        if state is State.CREATED and not start_of(vm).done:
            self._mark(vm, "resumed")
        memory = self._picture.of(id)
        memory.running, memory.stalled = self._rt.clock.monotonic(), None
        self._guests.resumed(id)
        await self._rt.faults.at("start.resumed")

    async def pause(self, vm: Vm) -> None:
        self._guests.hold(vm.meta.id)
        await self._engine.pause(vm.meta.id)

    async def reset(self, vm: Vm) -> None:
        await self._engine.reset(vm.meta.id)
        self._guests.rebooted(vm.meta.id)
        memory = self._picture.of(vm.meta.id)
        memory.running, memory.asked, memory.repeated, memory.heard = self._rt.clock.monotonic(), None, None, False
        await self._records.write(vm, resets=vm.spec.resets)

    async def ask(self, vm: Vm) -> None:
        """Ask the guest to power off: through its agent, else with the power button (a second time: with both)."""
        id = vm.meta.id
        memory, now = self._picture.of(id), self._rt.clock.monotonic()
        again = memory.asked is not None
        memory.asked, memory.repeated = memory.asked or now, now
        self._book.step(id, "stop", "the guest is asked to power off")
        try:
            await self._guests.guest(id).shutdown()
            memory.heard = True
        except CorralError as error:
            self._book.step(id, "stop", f"by the power button ({error.message})")
        if again or not memory.heard:
            await self._engine.powerdown(id)
        await self._rt.faults.at("stop.asked")

    async def kill(self, vm: Vm) -> None:
        id = vm.meta.id
        self._book.step(id, "power off")
        self._picture.of(id).asked = self._rt.clock.monotonic()
        await self._guests.drop(id)
        await self._engine.kill(id)
        await self._rt.faults.at("stop.killed" if vm.meta.deleted is None else "delete.killed")

    async def forget(self, vm: Vm) -> Vm:
        """Remove the trace of a process that ended; what is remembered of this boot goes with it."""
        id = vm.meta.id
        await self._leave(id)
        await self._engine.remove(id)
        await disband(self._joined.groups, id, self._rt)
        self._picture.memory[id] = Memory()
        return vm

    async def _leave(self, id: str) -> None:
        await self._guests.drop(id)
        await self._joined.consoles.detach(id)

    async def teardown(self, vm: Vm) -> None:
        """Everything the VM owned, the record last: whatever is left after a kill is found again through it."""
        id = vm.meta.id
        self._book.step(id, "delete")
        await self._leave(id)
        await self._engine.remove(id)
        await disband(self._joined.groups, id, self._rt)
        await self._rt.faults.at("delete.removed")
        await self._joined.disks.remove(id)
        await self._rt.faults.at("delete.volume")
        for last in range(REMOVE_ROUNDS, 0, -1):
            try:
                current = await self._objects.get(Vm, id)
                volumes = [v for v in (await self._objects.list(Volume)).items if v.spec.vm == id]
                await self._book.finish_with(id, Remove(current), [Remove(volume) for volume in volumes])
                break
            except NotFound:
                break
            except Refused as error:
                if error.code != "stale" or last == 1:
                    raise
        self._picture.bury(id)
        self._picture.memory.pop(id, None)
        await self._rt.faults.at("delete.recorded")

    async def measure(self, vm: Vm) -> None:
        """Write down that the VM's root volume is there, and what it takes. Once a phase: it grows all the time."""
        memory = self._picture.of(vm.meta.id)
        if memory.measured is vm.status.phase:
            return
        memory.measured = vm.status.phase
        try:
            volume = await self._objects.find(Volume, f"{vm.meta.name}-root", vm.meta.project)
        except NotFound:
            return
        if volume.spec.vm != vm.meta.id:
            return
        used = await self._joined.disks.used(vm.meta.id)

        def mutate(current: Volume) -> Volume:
            status = msgspec.structs.replace(current.status, phase="ready", reason="", host=vm.status.host, used=used)
            return msgspec.structs.replace(current, status=status)

        try:
            await self._objects.change(Volume, volume.meta.id, mutate)
        except NotFound:
            return  # deleted meanwhile

    def starved(self, id: str) -> bool:
        """It stands still because its control group is at its limit of memory."""
        return self._joined.groups.starved(id)

    def ended_for_memory(self, id: str) -> bool:
        """The kernel ended a process of it for memory. Its groups count that until they are removed with its trace."""
        return self._joined.groups.ooms(id) > 0


def keys_of(vm: Vm, ssh_key: str) -> tuple[str, ...]:
    """Who may log in to a VM: its owner's keys, and Corral's own."""
    return (*vm.spec.ssh_keys, *((ssh_key,) if ssh_key else ()))
