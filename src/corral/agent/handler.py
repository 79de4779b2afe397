"""Brings one VM to rest: inspect, decide, write down what is seen, do one thing, look again.

The only place where records, machines and steps of one VM meet. Called by the agent's queue, for one VM at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from corral.agent.ends import OFF_FIELDS, Ends
from corral.agent.events import EventLog
from corral.agent.gate import Entrance
from corral.agent.guests import Guests
from corral.agent.host import Registration
from corral.agent.picture import Picture
from corral.agent.ports import BootFiles
from corral.agent.progress import TaskBook
from corral.agent.reconcile import OFF_STATES, Decision, Do, Gate, Seen, decide
from corral.agent.records import NotRecorded, VmRecords
from corral.agent.settings import Settings
from corral.agent.steps import Steps
from corral.agent.turns import Turns
from corral.engine.protocol import Engine, Sighting, State
from corral.errors import CorralError, NotFound, Refused
from corral.model import Phase, Vm
from corral.runtime import Runtime
from corral.store.objects import Objects
from corral.units import format_duration

log = structlog.get_logger("agent")

MOST_STEPS = 20
"""Steps for one VM in one go; a plan that is longer is a mistake, and must not keep a worker busy for ever."""

ENDING = (State.SHUTDOWN, State.PANICKED)


class VmHandler:
    """Handles VMs by id; see :meth:`handle`. ``poke``: have another VM handled soon."""

    def __init__(
        self, objects: Objects, engine: Engine, rt: Runtime, settings: Settings,
        *, picture: Picture, guests: Guests, book: TaskBook, records: VmRecords, steps: Steps, ends: Ends,
        events: EventLog, entrance: Entrance, turns: Turns, registration: Registration, poke: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._objects, self._engine, self._rt, self._settings = objects, engine, rt, settings
        self._picture, self._guests, self._book, self._records = picture, guests, book, records
        self._steps, self._ends, self._events, self._entrance = steps, ends, events, entrance
        self._turns, self._registration, self._poke = turns, registration, poke
        self._crowd: dict[str, None] = {}  # VMs that wait for memory, in the order in which they came

    async def handle(self, id: str) -> float | None:
        """Bring one VM to rest; returns seconds after which to look again."""
        for _ in range(MOST_STEPS):
            vm = self._picture.vms.get(id)
            if vm is None:
                return await self._without_record(id)
            if vm.status.host != self._registration.name:
                return await self._elsewhere(vm)
            sighting = await self._engine.inspect(id)
            self._note(vm, sighting)
            if sighting.state not in OFF_STATES:
                await self._steps.join(vm, sighting.state, self._files(vm))
            decision, seen = self._decide(vm, sighting)
            try:
                vm = await self._write(vm, sighting, decision)
                if decision.do in (Do.REST, Do.QUARANTINE):
                    return await self._rest(vm, decision)
                await self._perform(vm, seen, decision)
            except Refused as error:
                # Stale: decided from an old record, look again. A record that is gone has been buried where it was
                # missed; anything else that was not found is an error like others.
                if error.code != "stale" and id in self._picture.vms:
                    raise
        return 1.0

    def _note(self, vm: Vm, sighting: Sighting) -> None:
        """Remember what an inspection shows: who lives, who is ending since when."""
        memory, now = self._picture.of(vm.meta.id), self._rt.clock.monotonic()
        if sighting.state in OFF_STATES:
            if vm.meta.id in self._picture.alive:
                self._picture.alive.discard(vm.meta.id)
                for waiting in self._crowd:
                    self._poke(waiting)
                self._crowd.clear()
        else:
            self._picture.alive.add(vm.meta.id)
        memory.ending = (memory.ending or now) if sighting.state in ENDING else None
        self._guests.engine_seen(vm.meta.id, sighting.state)
        if sighting.state is State.RUNNING:
            memory.running = memory.running or now
        if sighting.state is State.STALLED:
            memory.stalled = memory.stalled or now
            self._guests.hold(vm.meta.id)

    def _decide(self, vm: Vm, sighting: Sighting) -> tuple[Decision, Seen]:
        now = self._rt.clock.now()
        seen = self._seen(vm.meta.id, sighting)
        decision = decide(vm, seen, now, self._settings)
        if decision.do is Do.START:
            seen = seen._replace(gate=self._entrance.ask(vm))
            decision = decide(vm, seen, now, self._settings)
            if seen.gate.reason and not seen.gate.error:
                self._crowd[vm.meta.id] = None
                self._book.step(vm.meta.id, "turn", seen.gate.reason)
        return decision, seen

    def _seen(self, id: str, sighting: Sighting) -> Seen:
        memory, now = self._picture.of(id), self._rt.clock.monotonic()

        def since(moment: float | None) -> float | None:
            return None if moment is None else now - moment

        return Seen(
            state=sighting.state, exit=sighting.exit, epoch=sighting.epoch, guest=self._guests.view(id), gate=Gate(),
            asked_s=since(memory.asked), repeat_s=since(memory.repeated), heard=memory.heard,
            running_s=since(memory.running), ending_s=since(memory.ending), stalled_s=since(memory.stalled),
            fault=sighting.fault, disk_error_s=since(memory.disk_error), disk_words=memory.disk_words,
            silent_s=since(self._guests.engine_silent_at(id)),
            oom=sighting.state is State.EXITED and self._steps.ended_for_memory(id),
            starved=sighting.state is State.UNRESPONSIVE and self._steps.starved(id),
        )  # fmt: skip

    async def _write(self, vm: Vm, sighting: Sighting, decision: Decision) -> Vm:
        """Write what is seen before it is acted upon. Ends write themselves; a start writes with its ports."""
        if decision.do in (Do.END, Do.START):
            return vm
        status = vm.status
        fields: dict[str, Any] = {"phase": decision.phase, "reason": decision.reason, "cause": decision.cause}
        if decision.sure and decision.do is not Do.QUARANTINE:
            fields["observed"] = vm.meta.generation
        if sighting.state in OFF_STATES and decision.do is not Do.QUARANTINE:
            fields |= OFF_FIELDS
        elif decision.do is not Do.QUARANTINE:
            info = self._guests.info(vm.meta.id)
            fields |= {
                "pid": sighting.pid, "memory": sighting.memory or status.memory,
                "started_at": status.started_at or sighting.started_at,
                "accelerator": sighting.accelerator or status.accelerator,
                "guest": info.agent if info else status.guest,
                "addresses": info.addresses if info else status.addresses,
            }  # fmt: skip
            if decision.phase is Phase.RUNNING:
                fields |= await self._steps.came_up(vm)
        return await self._records.write(vm, **fields)

    async def _perform(self, vm: Vm, seen: Seen, decision: Decision) -> None:
        do = decision.do
        try:
            if do is Do.START:
                files = self._files(vm)
                assert files is not None, "the gate was open without an image"
                await self._steps.start(vm, files)
            elif do is Do.RESUME:
                await self._steps.resume(vm, seen.state)
            elif do is Do.PAUSE:
                await self._steps.pause(vm)
            elif do is Do.RESET:
                await self._steps.reset(vm)
            elif do is Do.ASK:
                await self._steps.ask(vm)
            elif do is Do.KILL:
                await self._steps.kill(vm)
            elif do is Do.FORGET:
                await self._steps.forget(vm)
            elif do is Do.TEARDOWN:
                await self._steps.teardown(vm)
            else:
                await self._ends.unasked(vm, seen, decision)
        except CorralError as error:
            blameless = error.code == "stale" or isinstance(error, NotRecorded)
            if do is not Do.START or blameless or vm.meta.id not in self._picture.vms:
                raise
            log.warning("a VM could not be started", vm=vm.meta.name, error=error.message)
            self._turns.give(vm.meta.id)
            await self._ends.failed(self._picture.vms.get(vm.meta.id, vm), error)
        finally:
            if do in (Do.END, Do.KILL, Do.FORGET, Do.TEARDOWN):
                self._turns.give(vm.meta.id)

    async def _rest(self, vm: Vm, decision: Decision) -> float | None:
        """Nothing more to do now: end the tasks that are fulfilled, and say when to look again."""
        id, phase = vm.meta.id, vm.status.phase
        if phase not in (Phase.STARTING, Phase.PENDING):
            self._turns.give(id)
        memory = self._picture.of(id)
        patience = self._settings.stop_patience_s
        if phase is Phase.STOPPING and memory.asked is not None and not memory.complained:
            waited = self._rt.clock.monotonic() - memory.asked
            if waited >= patience:
                memory.complained = True
                text = f"the guest has not powered off for {format_duration(waited)}"
                self._events.emit(vm, "StopTimeout", text, "warning")
        if phase is Phase.STOPPED:
            await self._rt.faults.at("stop.recorded")
        if phase is Phase.STARTING:
            self._book.step(id, "guest", decision.reason)
        due = await self._book.settle(id, vm)
        if phase in (Phase.RUNNING, Phase.STOPPED) and vm.status.boots:
            await self._steps.measure(vm)
        times = [time for time in (decision.again, due) if time is not None]
        return min(times) if times else None

    async def _without_record(self, id: str) -> float | None:
        """No record: nothing is touched. A VM that was deleted is let go of."""
        self._turns.give(id)
        self._crowd.pop(id, None)
        self._picture.memory.pop(id, None)
        await self._guests.drop(id)
        if id in self._picture.alive:
            log.warning("the record of a running machine is gone; the machine is left alone", vm=id)
            self._picture.alive.discard(id)
        if self._book.of(id):
            # The task may have been seen before the VM (they are listed one after the other): ask the store itself.
            try:
                self._picture.put(await self._objects.get(Vm, id))
                return 0.05
            except NotFound:
                await self._book.settle(id, None)
        return None

    async def _elsewhere(self, vm: Vm) -> float | None:
        """Not ours (or not yet). A process of it here that the record has left behind is told about, not touched."""
        id = vm.meta.id
        if not vm.status.host:
            return await self._book.settle(id, vm)  # nobody else watches the tasks of a VM that no host takes
        if id in self._picture.alive:
            self._picture.alive.discard(id)
            await self._guests.drop(id)
            text = f"a process of it is on {self._registration.name}, the record says {vm.status.host or 'nowhere'}"
            self._events.emit(vm, "Quarantined", text, "error")
        return None

    def _files(self, vm: Vm) -> BootFiles | None:
        return self._entrance.files(vm)
