"""Verbs on VMs that exist. Each writes a wish into the record and a task beside it; the agent does the rest."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.api.bodies import Power as PowerBody
from corral.api.service.ground import bumped, changed, fingerprint_of
from corral.api.service.launch import Launching, changed_spec
from corral.errors import NotFound, Refused
from corral.model import Image, Phase, Power, Task, TaskState, Vm
from corral.model.validate import accept, timeout_problems
from corral.scheduler.place import choose, need_of

VERBS = ("start", "stop", "restart", "reset", "pause", "resume")
OFF = (Phase.STOPPED, Phase.ERROR, Phase.PENDING)
"""Phases in which a VM surely has no process, or never had one."""
UP = (Phase.STARTING, Phase.RUNNING, Phase.UNRESPONSIVE, Phase.PAUSED)


class Powering(Launching):
    """``power``, ``delete_vm``, ``judge``."""

    async def power(self, verb: str, ref: str, tree: Any = None, *, project: str = "default", key: str = "") -> Task:
        """start, stop, restart, reset, pause or resume; the task. ``tree``: a body (:class:`~corral.api.bodies.Power`).

        Asking for what is so already is fine: the task is done at once. Raises NotFound, Refused ``wrong-phase``,
        ``no-capacity``, ``idempotency``.
        """
        assert verb in VERBS, verb
        body = accept(PowerBody, {} if tree is None else tree, "", lambda b: timeout_problems(b.timeout_s))
        vm = await self.objects.find(Vm, ref, project)
        fingerprint = fingerprint_of(f"{verb} {vm.meta.id}", {} if tree is None else tree)
        earlier = await self.replay(key, vm.meta.project, fingerprint)
        if earlier:
            return earlier[0]
        if verb in ("start", "restart", "resume") and vm.spec.power is Power.STOPPED:
            _refuse_impossible(verb, vm)
            await self.admit([vm], await self._image_of(vm))

        def plan(now: Vm) -> tuple[Vm, Task | None]:
            _refuse_impossible(verb, now)
            wanted = changed(now, meta=bumped(now.meta), spec=changed_spec(now.spec, **_wish(verb, now, body.force)))
            return wanted, self.task(verb, wanted, deadline_s=body.timeout_s, key=key, fingerprint=fingerprint)

        try:
            _, task = await self.swap(Vm, vm.meta.id, plan)
        except Refused as error:
            earlier = await self.replay(key, vm.meta.project, fingerprint) if error.code == "exists" else ()
            if earlier:
                return earlier[0]
            raise
        assert task is not None
        return task

    async def delete_vm(self, ref: str, *, project: str = "default", force: bool = False) -> Task:
        """Ask for the end of a VM and everything it owns. A running one is refused without ``force``.

        Asked again while it goes on: the same task.
        """
        vm = await self.objects.find(Vm, ref, project)
        if vm.meta.deleted is not None:
            open_task = await self._deleting(vm)
            if open_task is not None:
                return open_task

        def plan(now: Vm) -> tuple[Vm, Task | None]:
            if now.status.phase not in OFF and not force and now.meta.deleted is None:
                raise Refused(
                    f"{now.meta.name} is {now.status.phase}", code="wrong-phase",
                    hint="stop it first, or delete it with --force",
                )  # fmt: skip
            meta = bumped(now.meta)
            if meta.deleted is None:
                meta = msgspec.structs.replace(meta, deleted=self.rt.clock.now())
            wanted = changed(now, meta=meta, spec=changed_spec(now.spec, force=True))
            return wanted, self.task("delete", wanted, deadline_s=None)

        _, task = await self.swap(Vm, vm.meta.id, plan)
        assert task is not None
        return task

    async def _deleting(self, vm: Vm) -> Task | None:
        for task in (await self.objects.list(Task, vm.meta.project)).items:
            if task.spec.target_id == vm.meta.id and task.spec.verb == "delete" and not task.status.state.final:
                return task
        return None

    async def cancel_task(self, ref: str, *, project: str = "default") -> Task:
        """Cancel a task and take back its wish. One that has ended stays as it is; a delete cannot be taken back."""
        task = await self.objects.find(Task, ref, project)
        if task.status.state.final:
            return task
        if task.spec.verb == "delete":
            raise Refused("a delete cannot be cancelled: parts of it are gone already", code="wrong-phase")
        if task.spec.target_kind == Vm.KIND:
            await self._take_back(task)

        def mark(now: Task) -> Task | None:
            if now.status.state.final or now.spec.cancel:
                return None
            spec = msgspec.structs.replace(now.spec, cancel=True)
            if now.spec.target_kind != Vm.KIND:
                return changed(now, spec=spec)  # the agent stops the work, and says so
            problem: dict[str, Any] = {"type": "urn:corral:error:cancelled", "title": "Cancelled", "status": 409}
            problem |= {"code": "cancelled", "detail": "cancelled"}
            status = msgspec.structs.replace(
                now.status,
                state=TaskState.CANCELLED,
                ended=self.rt.clock.now(),
                error=problem,
            )
            return changed(now, spec=spec, status=status)

        return await self.objects.change(Task, task.meta.id, mark)

    async def _take_back(self, task: Task) -> None:
        """A start that is cancelled wants the VM off again, a stop wants it on again."""
        verb = task.spec.verb
        if verb in ("launch", "start", "restart"):
            power = Power.STOPPED
        elif verb in ("stop", "pause"):
            power = Power.RUNNING
        else:
            return  # reset, resume: nothing to take back

        def plan(now: Vm) -> tuple[Vm, Task | None]:
            if now.meta.generation != task.spec.generation or now.meta.deleted is not None:
                return now, None  # somebody has asked for something else since: that counts
            cut = verb in ("launch", "start") and now.status.phase is not Phase.RUNNING
            spec = changed_spec(now.spec, power=power, force=cut)
            return changed(now, meta=bumped(now.meta), spec=spec), None

        try:
            await self.swap(Vm, task.spec.target_id, plan)
        except NotFound:
            return  # the VM is gone: nothing to take back

    async def judge(self, vm: Vm) -> dict[str, Any]:
        """What a VM needs, what every host would say to it now, and which one would be chosen."""
        image = await self._image_of(vm)
        arch = image.spec.arch if image is not None else ""
        need = need_of(vm, arch=arch, host=image.status.host if image is not None else "")
        chosen, table = choose(need, await self.ledger.rooms(without=vm.meta.id))
        return {"best": chosen, "need": need._asdict(), "hosts": tuple(verdict.as_row() for verdict in table)}

    async def _image_of(self, vm: Vm) -> Image | None:
        try:
            return await self.objects.get(Image, vm.spec.image_id)
        except NotFound:
            return None


def _refuse_impossible(verb: str, vm: Vm) -> None:
    """Raises Refused ``wrong-phase`` where a verb means nothing in the present phase."""
    phase, name = vm.status.phase, vm.meta.name
    if vm.meta.deleted is not None:
        raise Refused(f"{name} is being deleted", code="wrong-phase")
    if verb in ("reset", "pause") and (vm.spec.power is Power.STOPPED or phase not in UP):
        raise Refused(f"{name} is {phase}: there is nothing to {verb}", code="wrong-phase", hint="start it first")
    if verb == "resume" and vm.spec.power is Power.STOPPED:
        raise Refused(f"{name} is {phase}, not paused", code="wrong-phase", hint="start it instead")


def _wish(verb: str, vm: Vm, force: bool) -> dict[str, Any]:
    """The fields of the spec that a verb writes."""
    spec = vm.spec
    if verb == "stop":
        return {"power": Power.STOPPED, "force": force}
    if verb == "restart":
        return {"power": Power.RUNNING, "force": force, "boots": max(spec.boots, vm.status.boots) + 1}
    if verb == "reset":
        return {"force": False, "resets": max(spec.resets, vm.status.resets) + 1}
    return {"power": Power.PAUSED if verb == "pause" else Power.RUNNING, "force": False}
