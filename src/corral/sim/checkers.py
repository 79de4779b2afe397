"""The invariants, checked at every change of the store and of the host, by code that shares nothing with the platform.

Numbers are those of the specification: I1 one machine a disk · I3 acknowledged once and for all · I4 epochs only rise ·
I6 nothing is destroyed (or started) by ignorance · I7 what is wanted is so, or the record says why not · I8 nothing
leaks. A broken one is noted and told; it never stops the run, so that the story goes on to its end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from corral.engine.fake import FakeMachine
from corral.engine.protocol import Machine, State
from corral.model import Phase, Power, Task, TaskState, Vm
from corral.sim.narration import Narration
from corral.sim.world import SimDisks, SimWorld
from corral.store.protocol import Batch, Change

STALE_S = 30.0
"""How old a record may be that an agent acts upon: its watch is delayed, and each step takes a while."""

LEAST_SILENCE_S = 14.0
"""Nobody is given up who was silent for less: three missed beats, and the patience of the simulated settings."""
GIVEN_UP = ("guest-hang", "qemu-silent")

_vm = msgspec.json.Decoder(Vm)
_task = msgspec.json.Decoder(Task)


@dataclass(slots=True)
class Life:
    """What is known of one VM from the outside. ``wished``: since its present machine was made."""

    vm: Vm | None = None
    created: bool = False
    off_since: float | None = None
    wished_off: bool = False
    wished_pause: bool = False
    wished_reset: bool = False
    epoch: int = 0
    disk_made: bool = False
    hurt: float = -1e9
    """When something was last done to its machine by nature."""
    silent_since: float | None = None
    silent_until: float | None = None
    """When its guest, or its QEMU, last fell silent, and answered again."""


@dataclass
class Checkers:
    """Watches everything. ``broken``: what did not hold, in words."""

    narration: Narration
    host: str
    world: SimWorld = field(init=False)
    disks: SimDisks = field(init=False)
    broken: list[str] = field(default_factory=list)
    lives: dict[str, Life] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    orphans: set[str] = field(default_factory=set)
    made_by: dict[str, set[str]] = field(default_factory=dict)
    """Request key → ids of the VMs it made."""

    def breaks(self, invariant: str, text: str) -> None:
        """An invariant does not hold."""
        line = f"{invariant}: {text}"
        self.narration.tell(f"BROKEN {line}")
        if line not in self.broken:
            self.broken.append(line)

    def name(self, id: str) -> str:
        """What a person calls it."""
        life = self.lives.get(id)
        return life.vm.meta.name if life is not None and life.vm is not None else f"machine {id[:8]}"

    def present(self) -> list[str]:
        """Names of the VMs that have records."""
        return [life.vm.meta.name for life in self.lives.values() if life.vm is not None]

    def expect(self, holds: bool, invariant: str, text: str) -> None:
        if not holds:
            self.breaks(invariant, text)

    # The store

    def published(self, batch: Batch) -> None:
        """One transaction of the store."""
        keys = {change.key: change for change in batch.changes}
        for change in batch.changes:
            _, plural, *rest = change.key.split("/")
            if plural == "vms":
                self._vm_changed(change, rest[0], keys)
            elif plural == "tasks":
                self._task_changed(change, rest[0], keys)

    def _vm_changed(self, change: Change, id: str, keys: dict[str, Change]) -> None:
        life = self.lives.setdefault(id, Life())
        before = life.vm
        if change.entry is None:
            self._vm_removed(id, life, keys)
            return
        vm = _vm.decode(change.entry.value)
        if before is None:
            self.expect(not life.created, "I8", f"the record of {vm.meta.name} came back after it was removed")
            key = vm.meta.labels.get("request")
            if key:
                made = self.made_by.setdefault(key, set())
                made.add(id)
                self.expect(len(made) == 1, "I3", f"request {key} made {len(made)} VMs")
        else:
            self._told(before, vm)
            moved = vm.status.host != before.status.host
            self.expect(vm.status.epoch >= before.status.epoch, "I4", f"the epoch of {vm.meta.name} fell")
            self.expect(not moved or vm.status.epoch > before.status.epoch, "I4", f"{vm.meta.name} moved in its epoch")
            kept = before.meta.deleted is None or vm.meta.deleted is not None
            self.expect(kept, "I6", f"the deletion of {vm.meta.name} was forgotten")
            rising = vm.spec.boots >= before.spec.boots and vm.meta.generation >= before.meta.generation
            self.expect(rising, "I3", f"a wish about {vm.meta.name} was lost: boots or generation fell")
            if gave_up(vm) and not gave_up(before):
                self.expect(self._was_silent(life), "I6", f"{vm.meta.name} is given up, and was not silent for long")
            lost = vm.spec != before.spec and vm.meta.generation == before.meta.generation
            self.expect(not lost, "I3", f"the spec of {vm.meta.name} changed without a new generation")
        life.vm, life.created = vm, True
        now = asyncio.get_running_loop().time()
        off = vm.meta.deleted is not None or vm.spec.power is Power.STOPPED
        life.off_since = (life.off_since if life.off_since is not None else now) if off else None
        life.wished_off |= off or vm.spec.boots > vm.status.boots
        life.wished_pause |= vm.spec.power is Power.PAUSED
        life.wished_reset |= vm.spec.resets > vm.status.resets

    def _was_silent(self, life: Life) -> bool:
        now = asyncio.get_running_loop().time()
        if life.silent_since is None or now - life.silent_since < LEAST_SILENCE_S:
            return False
        return life.silent_until is None or now - life.silent_until < STALE_S

    def _vm_removed(self, id: str, life: Life, keys: dict[str, Change]) -> None:
        vm = life.vm
        assert vm is not None
        name, project = vm.meta.name, vm.meta.project
        self.narration.tell(f"record of {name} removed")
        self.expect(vm.meta.deleted is not None, "I6", f"the record of {name} went, and nobody had asked for that")
        self.expect(id not in self.world.machines, "I8", f"the record of {name} went before its machine")
        self.expect(id not in self.disks.parts, "I8", f"the record of {name} went before its disks")
        freed = keys.get(f"/names/vms/{project}/{name}")
        self.expect(freed is not None and freed.entry is None, "I8", f"the name of {name} was not freed with it")
        life.vm = None

    def _told(self, before: Vm, vm: Vm) -> None:
        if (before.status.phase, before.status.host) != (vm.status.phase, vm.status.host):
            reason = f" ({vm.status.reason})" if vm.status.reason else ""
            self.narration.tell(f"{vm.meta.name}: {vm.status.phase}{reason} host={vm.status.host or '-'}")

    def _task_changed(self, change: Change, id: str, keys: dict[str, Change]) -> None:
        before = self.tasks.get(id)
        if change.entry is None:
            self.expect(before is None or before.status.state.final, "I3", f"task {id} was removed before it ended")
            return
        task = self.tasks[id] = _task.decode(change.entry.value)
        if before is not None and before.status.state.final:
            same = before.status.state is task.status.state
            self.expect(same, "I3", f"the {task.spec.verb} of {task.spec.target_name} ended twice")
        elif task.status.state.final:
            told = (task.status.error or {}).get("detail", "")
            self.narration.tell(f"task {task.spec.verb} {task.spec.target_name}: {task.status.state} {told}".rstrip())
            if task.status.state is TaskState.DONE:
                self._done(task, keys)

    def _done(self, task: Task, keys: dict[str, Change]) -> None:
        """A task that says it is done must be right, unless something happened, or was asked for, a moment ago."""
        life = self.lives.get(task.spec.target_id, Life())
        what = f"the {task.spec.verb} of {task.spec.target_name} is said to be done, but"
        gone = life.vm is None or f"/vms/{task.spec.target_id}" in keys
        if task.spec.verb == "delete":
            self.expect(gone, "I7", f"{what} its record is there")
            return
        if gone or life.vm is None or life.vm.meta.generation > task.spec.generation:
            return
        if asyncio.get_running_loop().time() - life.hurt < STALE_S:
            return
        machine = self.world.machines.get(task.spec.target_id)
        state = state_of(machine)
        wanted = {"stop": State.EXITED, "pause": State.PAUSED}.get(task.spec.verb, life_state(life.vm))
        self.expect(state is wanted, "I7", f"{what} its machine is {state}")
        if wanted is State.RUNNING:
            self.expect(self.world.answers(task.spec.target_id), "I7", f"{what} its guest does not answer")

    # The host

    def hurt(self, id: str) -> None:
        """Nature does something to a machine."""
        self.lives.setdefault(id, Life()).hurt = asyncio.get_running_loop().time()

    def silenced(self, id: str, silent: bool) -> None:
        """A guest or its QEMU falls silent, or answers again."""
        life, now = self.lives.setdefault(id, Life()), asyncio.get_running_loop().time()
        if not silent:
            life.silent_until = now
        elif life.silent_since is None or life.silent_until is not None:
            life.silent_since, life.silent_until = now, None

    def creating(self, machine: Machine) -> None:
        id, now = machine.id, asyncio.get_running_loop().time()
        life = self.lives.setdefault(id, Life())
        life.silent_since = life.silent_until = None
        name = self.name(id)
        self.narration.tell(f"host: create {name} epoch={machine.epoch}")
        if life.vm is None:
            self.breaks("I6", f"{name} is started and has no record")
            return
        owner = life.vm.status
        self.expect(owner.host == self.host, "I1", f"{name} is started by a host that does not own it")
        self.expect(machine.epoch >= life.epoch, "I4", f"{name} is started in epoch {machine.epoch} after {life.epoch}")
        self.expect(machine.epoch == owner.epoch, "I4", f"{name} is started in an epoch that is not its record's")
        fresh = life.off_since is None or now - life.off_since < STALE_S
        self.expect(fresh, "I6", f"{name} is started, though it has long been wanted off")
        self.expect("root" in self.disks.parts.get(id, ()), "I1", f"{name} is started without its disk")
        life.epoch = max(life.epoch, machine.epoch)
        life.wished_off = life.off_since is not None or life.vm.spec.boots > life.vm.status.boots
        life.wished_pause = life.vm.spec.power is Power.PAUSED
        life.wished_reset = life.vm.spec.resets > owner.resets

    def killing(self, id: str) -> None:
        life, name = self.lives.get(id), self.name(id)
        self.narration.tell(f"host: kill {name}")
        if life is None or life.vm is None:
            self.breaks("I6", f"{name} is killed and has no record")
        elif self.world.machines[id].state not in (State.PANICKED, State.SHUTDOWN):
            wanted = life.wished_off or gave_up(life.vm)
            self.expect(wanted, "I6", f"{name} is killed, and its record never wanted that")

    def removing(self, id: str) -> None:
        life = self.lives.get(id)
        self.expect(life is not None and life.vm is not None, "I6", f"{self.name(id)} is removed and has no record")

    def resetting(self, id: str) -> None:
        life = self.lives.get(id)
        self.expect(life is not None and life.wished_reset, "I6", f"{self.name(id)} is reset, and nobody wanted that")

    def pausing(self, id: str) -> None:
        life = self.lives.get(id)
        self.expect(life is not None and life.wished_pause, "I6", f"{self.name(id)} is paused, and nobody wanted that")

    def asking(self, id: str) -> None:
        life = self.lives.get(id)
        asked = life is not None and life.wished_off
        self.expect(asked, "I6", f"{self.name(id)} is asked to power off, and nobody wanted that")

    def disk_made(self, id: str) -> None:
        life = self.lives.setdefault(id, Life())
        self.expect(life.vm is not None, "I8", f"a disk is made for {self.name(id)}, which has no record")
        self.expect(not life.disk_made, "I6", f"the disk of {self.name(id)} is made anew: its data are gone")
        life.disk_made = True

    def disk_removing(self, id: str) -> None:
        life, name = self.lives.get(id), self.name(id)
        self.narration.tell(f"host: remove the disks of {name}")
        if life is None or life.vm is None:
            self.breaks("I6", f"the disks of {name} are removed and have no record")
            return
        self.expect(life.vm.meta.deleted is not None, "I6", f"the disks of {name} are removed: nobody wanted that")
        machine = self.world.machines.get(id)
        self.expect(machine is None or not machine.alive, "I1", f"the disks of {name} are removed while it runs")


def gave_up(vm: Vm) -> bool:
    """The record says that it hung, and that this was its end."""
    return vm.status.cause in GIVEN_UP and vm.status.phase in (Phase.PENDING, Phase.ERROR)


def life_state(vm: Vm) -> State:
    """What a machine must be when its VM is as wanted."""
    if vm.spec.power is Power.STOPPED:
        return State.EXITED
    return State.PAUSED if vm.spec.power is Power.PAUSED else State.RUNNING


def state_of(machine: FakeMachine | None) -> State:
    """What a machine is in truth. One whose CPUs never ran, or whose disk is full, is as still as a paused one."""
    if machine is None or not machine.alive:
        return State.EXITED
    return State.PAUSED if machine.state in (State.CREATED, State.STALLED) else machine.state


def settled(vm: Vm) -> bool:
    """The record says that what is wanted is so."""
    wanted = {Power.RUNNING: Phase.RUNNING, Power.PAUSED: Phase.PAUSED, Power.STOPPED: Phase.STOPPED}
    done = vm.spec.power is Power.STOPPED or (vm.status.boots >= vm.spec.boots and vm.status.resets >= vm.spec.resets)
    return vm.status.phase is wanted[vm.spec.power] and vm.status.observed == vm.meta.generation and done


def excused(vm: Vm) -> bool:
    """The record says why what is wanted is not so, and that it stays so (or until when)."""
    if vm.status.phase is Phase.ERROR:
        return bool(vm.status.reason)
    return vm.status.phase is Phase.PENDING and bool(vm.status.reason)
