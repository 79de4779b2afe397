"""Known bugs, each a small change of the real code, that the simulator must find. One that it misses makes it worthless.

Each is a context manager: inside it the bug is there. The names are sentences about what the code then does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import msgspec

from corral.agent import agent, reconcile, steps, verdict
from corral.agent.reconcile import down, up
from corral.agent.records import VmRecords
from corral.api.service.ground import Ground
from corral.engine.protocol import State
from corral.errors import Unavailable, Unknown
from corral.model import Phase, Power, Vm
from corral.runtime import KeyedQueue
from corral.store import objects
from corral.store.protocol import Compare, Op

Bug = Callable[[], AbstractContextManager[None]]
BUGS: dict[str, Bug] = {}


def bug(plant: Callable[[], Iterator[None]]) -> Bug:
    made = contextmanager(plant)
    BUGS[plant.__name__] = made
    return made


@bug
def an_update_does_not_compare_the_revision() -> Iterator[None]:
    plan = objects._plan

    def careless(write: objects.Write, compares: list[Compare], ops: list[Op]) -> None:
        before = len(compares)
        plan(write, compares, ops)
        if isinstance(write, objects.Update):
            del compares[before:]

    with mock.patch.object(objects, "_plan", careless):
        yield


@bug
def a_delete_frees_the_record_before_the_volume() -> Iterator[None]:
    teardown = steps.Steps.teardown

    async def hasty(self: Any, vm: Vm) -> None:
        class Later:
            async def remove(self, id: str) -> None:
                return None

        joined = self._joined
        self._joined = joined._replace(disks=Later())
        try:
            await teardown(self, vm)
        finally:
            self._joined = joined
        await joined.disks.remove(vm.meta.id)

    with mock.patch.object(steps.Steps, "teardown", hasty):
        yield


@bug
def the_idempotency_key_is_ignored() -> Iterator[None]:
    task = Ground.task

    async def never(self: Any, key: str, project: str, fingerprint: str) -> tuple[Any, ...]:
        return ()

    def anew(self: Any, verb: str, target: Any, **options: Any) -> Any:
        return task(self, verb, target, **{**options, "key": ""})

    with mock.patch.object(Ground, "replay", never), mock.patch.object(Ground, "task", anew):
        yield


@bug
def a_lost_reply_is_taken_for_a_failure_and_the_write_repeated_under_another_key() -> Iterator[None]:
    commit, task = Ground.commit, Ground.task

    async def again(self: Any, writes: Any) -> Any:
        try:
            return await commit(self, writes)
        except Unknown as error:
            raise objects.Refused("something changed", code="stale") from error

    def anew(self: Any, verb: str, target: Any, **options: Any) -> Any:
        made = task(self, verb, target, **options)
        return msgspec.structs.replace(made, meta=msgspec.structs.replace(made.meta, id=self.rt.random.id()))

    with mock.patch.object(Ground, "commit", again), mock.patch.object(Ground, "task", anew):
        yield


@bug
def a_store_that_is_away_is_taken_for_an_empty_one() -> Iterator[None]:
    read = objects.Objects.list

    async def trusting(self: Any, cls: Any, project: str | None = None) -> Any:
        try:
            return await read(self, cls, project)
        except Unavailable:
            return objects.Listing((), 0)

    with mock.patch.object(objects.Objects, "list", trusting):
        yield


@bug
def machines_that_no_record_knows_are_cleaned_up() -> Iterator[None]:
    survey = agent.Agent._survey

    async def tidy(self: Any) -> int:
        revision = await survey(self)
        for machine in await self.engine.inventory():
            if machine.id not in self.picture.vms and machine.state is not State.EXITED:
                await self.engine.kill(machine.id)
        return revision

    with mock.patch.object(agent.Agent, "_survey", tidy):
        yield


@bug
def after_a_restart_the_agent_starts_everything_afresh() -> Iterator[None]:
    survey = agent.Agent._survey

    async def afresh(self: Any) -> int:
        revision = await survey(self)
        for machine in await self.engine.inventory():
            if machine.id in self.picture.vms:
                await self.engine.kill(machine.id)
                await self.engine.remove(machine.id)
        return revision

    with mock.patch.object(agent.Agent, "_survey", afresh):
        yield


@bug
def a_broken_watch_goes_on_without_reading_again() -> Iterator[None]:
    read = agent.Agent._read

    async def once(self: Any) -> int:
        if self.picture.vms or self.picture.images:
            return int((await self.objects.store.range("/none")).revision)
        return await read(self)

    with mock.patch.object(agent.Agent, "_read", once):
        yield


@bug
def a_silent_hypervisor_is_killed() -> Iterator[None]:
    row = (reconcile.Wish.RUN, State.UNRESPONSIVE)
    with mock.patch.dict(reconcile.TABLE, {row: down.kill}):
        yield


@bug
def a_silent_guest_is_given_up_without_patience() -> Iterator[None]:
    hung = up.hung

    def hasty(vm: Vm, seen: reconcile.Seen, settings: Any) -> reconcile.Decision:
        return hung(vm, seen._replace(guest=seen.guest._replace(hung_s=1e9)), settings)

    with mock.patch.object(up, "hung", hasty):
        yield


@bug
def a_task_is_done_before_the_guest_answers() -> Iterator[None]:
    fulfilled = verdict._fulfilled

    def early(task: Any, vm: Vm) -> Any:
        if vm.status.phase is Phase.STARTING:
            vm = msgspec.structs.replace(vm, status=msgspec.structs.replace(vm.status, phase=Phase.RUNNING))
        return fulfilled(task, vm)

    with mock.patch.object(verdict, "_fulfilled", early):
        yield


@bug
def the_count_of_boots_is_never_written() -> Iterator[None]:
    write = VmRecords.write

    async def forgetful(self: Any, vm: Vm, *, power: Power | None = None, **status: Any) -> Vm:
        if vm.status.boots:
            status.pop("boots", None)
        return await write(self, vm, power=power, **status)

    with mock.patch.object(VmRecords, "write", forgetful):
        yield


@bug
def the_queue_forgets_what_is_added_while_it_is_handled() -> Iterator[None]:
    add = KeyedQueue.add

    def forgetful(self: Any, key: str, after: float = 0.0) -> None:
        if key not in self._running:
            add(self, key, after)

    with mock.patch.object(KeyedQueue, "add", forgetful):
        yield


@bug
def the_epoch_is_not_checked_or_kept() -> Iterator[None]:
    made = steps.machine_of

    def old(vm: Vm, files: Any, **parts: Any) -> Any:
        return msgspec.structs.replace(made(vm, files, **parts), epoch=0)

    with mock.patch.object(steps, "machine_of", old):
        yield


@bug
def the_answer_comes_before_the_write() -> Iterator[None]:
    commit = Ground.commit

    async def eager(self: Any, writes: Any) -> Any:
        try:
            return await commit(self, writes)
        except (Unavailable, Unknown):
            return tuple(write.object for write in writes if not isinstance(write, objects.Require))

    with mock.patch.object(Ground, "commit", eager):
        yield
