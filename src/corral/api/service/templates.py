"""Templates: asked for, deleted when no VM that was forked from them runs; and forks of running VMs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from corral.api.bodies import Accepted, CreateTemplate, Fork
from corral.api.service.ground import bumped, changed, fingerprint_of
from corral.api.service.images import Imaging
from corral.api.service.launch import TRIES, changed_spec
from corral.errors import NotFound, Problem, Refused
from corral.model import Image, ImagePhase, Nic, Phase, Power, Task, Template, TemplateSpec, Vm
from corral.model.base import Resource
from corral.model.template import default_name, making_takes
from corral.model.validate import (
    MAX_COUNT,
    accept,
    label_problems,
    name_problems,
    problems_of,
    refuse,
    timeout_problems,
)  # fmt: skip
from corral.model.vm import start_of
from corral.scheduler.place import Need, choose, sentence
from corral.store.objects import Create, Require, Write
from corral.units import format_size

DEADLINE_S = 600.0
"""A guest boots for it, under emulation perhaps, and comes to rest."""
MAX_PARENT = 54
"""Characters of a VM's name that a fork's name begins with, so that digits fit behind."""


class Templating(Imaging):
    """``create_template``, ``delete_template``, ``fork``."""

    async def create_template(self, tree: Any, *, key: str = "") -> Accepted:
        """A template, and the task that makes it (body: :class:`CreateTemplate` as a JSON tree).

        Raises Invalid, NotFound, Refused ``exists``, ``no-capacity``, ``wrong-phase``, ``idempotency``.
        """
        body = accept(CreateTemplate, tree, "", _template_problems)
        await self.project(body.project)
        fingerprint = fingerprint_of("templates", tree)
        earlier = await self.replay(key, body.project, fingerprint)
        for last in range(TRIES, 0, -1):
            if earlier:
                break
            image = await self._image_for(body)
            spec = msgspec.structs.replace(body.spec, image_id=image.meta.id)
            await self._fits(spec, image)
            name = body.name or default_name(spec)
            template = Template(meta=self.meta(name, body.project, body.labels), spec=spec)
            task = self.task(
                "template", template, deadline_s=body.timeout_s, key=key, fingerprint=fingerprint, default_s=DEADLINE_S
            )
            try:
                made, begun = await self.commit([Create(template), Create(task), Require(image)])
            except Refused as error:
                earlier = await self.replay(key, body.project, fingerprint)
                if not earlier and (last == 1 or error.code != "stale"):
                    raise
            else:
                assert isinstance(begun, Task)
                return Accepted(items=(made,), tasks=(begun,))
        try:
            items: tuple[Resource, ...] = (await self.objects.get(Template, earlier[0].spec.target_id),)
        except NotFound:
            items = ()
        return Accepted(items=items, tasks=earlier)

    async def _image_for(self, body: CreateTemplate) -> Image:
        image = await self.image(body.spec.image, body.project)
        if image.status.phase is not ImagePhase.READY:
            raise Refused(
                f"image {image.meta.name} is {image.status.phase}", code="wrong-phase", field="spec.image",
                hint="wait until it is ready",
            )  # fmt: skip
        return image

    async def _fits(self, spec: TemplateSpec, image: Image) -> None:
        """The image's demands, and room for its memory. Raises Invalid, Refused ``no-capacity``."""
        problems = []
        if spec.memory < image.status.min_memory:
            least = f"at least {format_size(image.status.min_memory)}"
            problems.append(Problem("spec.memory", f"{format_size(spec.memory)} is too little", least))
        if spec.disk is not None and spec.disk < max(1, image.status.virtual_size):
            problems.append(Problem("spec.disk", f"{format_size(spec.disk)} is less than the image's disk"))
        if spec.disk is not None and not image.status.virtual_size:
            problems.append(Problem("spec.disk", f"image {image.meta.name} has no disk", "no size"))
        refuse(problems)
        rooms = await self.ledger.rooms()
        need = Need(
            memory=making_takes(spec) * spec.memory, cpus=spec.cpus, arch=image.spec.arch, host=image.status.host
        )
        host, table = choose(need, rooms)
        if host is None and table and not any(room.phase == "unknown" for room in rooms):
            hosts = [verdict.as_row() for verdict in table]
            hint = "it takes its memory twice while it is made: stop or delete VMs, or ask for less"
            raise Refused(sentence(table), code="no-capacity", hint=hint, hosts=hosts)

    async def delete_template(self, ref: str, *, project: str = "default", revision: int | None = None) -> None:
        """Ask for the end of a template; Refused ``in-use`` while a VM forked from it runs, or is to be forked."""
        template = await self.objects.find(Template, ref, project)
        if revision is not None and template.meta.revision != revision:
            raise Refused(f"template {template.meta.name} has changed", code="stale", hint="read it again")
        users = [vm for vm in (await self.objects.list(Vm)).items if uses(vm, template.meta.id)]
        if users:
            names = ", ".join(vm.meta.name for vm in users[:5]) + (" …" if len(users) > 5 else "")
            count = f"{len(users)} VM{'s' if len(users) > 1 else ''}"
            raise Refused(
                f"template {template.meta.name} is used by {count}: {names}", code="in-use",
                hint="stop or delete those first", vms=[vm.meta.name for vm in users[:100]],
            )  # fmt: skip

        def doomed(now: Template) -> Template | None:
            if now.meta.deleted is not None:
                return None
            return changed(now, meta=msgspec.structs.replace(bumped(now.meta), deleted=self.rt.clock.now()))

        await self.objects.change(Template, template.meta.id, doomed)

    async def fork(self, ref: str, tree: Any = None, *, project: str = "default", key: str = "") -> Accepted:
        """Forks of a running VM, each with its task (body: :class:`Fork` as a JSON tree).

        A template is frozen from it for them, and goes when they no longer need it. Raises Invalid, NotFound, Refused
        ``wrong-phase``, ``unsupported``, ``exists``, ``no-capacity``, ``idempotency``.
        """
        tree = {} if tree is None else tree
        body = accept(Fork, tree, "", _fork_problems)
        parent = await self.objects.find(Vm, ref, project)
        fingerprint = fingerprint_of(f"fork {parent.meta.id}", tree)
        earlier = await self.replay(key, parent.meta.project, fingerprint)
        if earlier:
            return await self._answer_again(earlier)
        _refuse_unforkable(parent)
        image = await self._image_of(parent)
        if image is None:
            raise Refused(f"the image of {parent.meta.name} is gone", code="wrong-phase")
        template = self._frozen(parent)
        vms = [self._child(parent, template, body, name) for name in self._fork_names(parent, body)]
        tasks = [
            self.task("fork", vm, deadline_s=body.timeout_s, key=key, fingerprint=fingerprint, number=number)
            for number, vm in enumerate(vms)
        ]
        writes: list[Write] = [Create(template)]
        for vm, task in zip(vms, tasks, strict=True):
            disk = [Create(self._root(vm, image))] if image.status.virtual_size else []
            writes += [Create(vm), *disk, Create(task)]
        try:
            await self.admit(vms, image)
            written = await self.commit(writes)
        except BaseException as error:
            for vm in vms:
                self.ledger.drop(vm.meta.id)
            earlier = await self.replay(key, parent.meta.project, fingerprint) if isinstance(error, Refused) else ()
            if earlier:
                return await self._answer_again(earlier)
            raise
        return Accepted(
            items=tuple(obj for obj in written if isinstance(obj, Vm)),
            tasks=tuple(obj for obj in written if isinstance(obj, Task)),
        )

    def _frozen(self, parent: Vm) -> Template:
        """The template that is frozen from a running VM for its forks."""
        spec = parent.spec
        return Template(
            meta=self.meta(
                f"{parent.meta.name[:MAX_PARENT]}-{self.rt.random.token(4).hex()}", parent.meta.project, {}
            ),
            spec=TemplateSpec(
                image=spec.image, image_id=spec.image_id, cpus=spec.cpu.count, cpu_model=spec.cpu.model,
                memory=spec.memory.size, disk=spec.disk.size, firmware=spec.firmware, cards=len(spec.nics), auto=True,
                source=parent.meta.id,
            ),
        )  # fmt: skip

    def _fork_names(self, parent: Vm, body: Fork) -> list[str]:
        if body.name is not None:
            return [body.name] if body.count == 1 else [f"{body.name}-{n + 1}" for n in range(body.count)]
        stem = parent.meta.name[:MAX_PARENT]
        return [f"{stem}-{self.rt.random.token(4).hex()}" for _ in range(body.count)]

    def _child(self, parent: Vm, template: Template, body: Fork, name: str) -> Vm:
        """A fork: all that the parent has except what must be its own. Its user data has run, in the parent."""
        nics = tuple(
            Nic(
                network=nic.network, mac=self._mac(),
                publish=tuple(msgspec.structs.replace(port, host=0) for port in nic.publish),
            )
            for nic in parent.spec.nics
        )  # fmt: skip
        spec = changed_spec(
            parent.spec, nics=nics, hostname="", user_data="", power=Power.RUNNING, cold=False,
            ephemeral=False, template=template.meta.id, boots=1, resets=0, force=False,
        )  # fmt: skip
        labels = {**parent.meta.labels, **body.labels}
        return Vm(meta=self.meta(name, parent.meta.project, labels), spec=spec)


def uses(vm: Vm, template_id: str) -> bool:
    """Whether a VM runs on a template's memory, or has yet to be forked from it."""
    start = start_of(vm)
    if vm.spec.template == template_id and not start.done and vm.meta.deleted is None:
        return True
    return start.template_id == template_id and vm.status.pid is not None


def _refuse_unforkable(parent: Vm) -> None:
    name = parent.meta.name
    if parent.meta.deleted is not None or parent.status.phase is not Phase.RUNNING:
        raise Refused(
            f"{name} is {parent.status.phase}: only a running VM is forked", code="wrong-phase", hint="start it first"
        )
    if not parent.status.guest:
        raise Refused(
            f"nobody answers in {name}: its forks could not be told who they are", code="unsupported",
            hint="its image needs corral-guest or qemu-guest-agent",
        )  # fmt: skip
    if len(parent.spec.nics) > 1:
        raise Refused(
            f"{name} has {len(parent.spec.nics)} cards; a fork can be given one address", code="unsupported",
            hint="fork VMs with one card or none",
        )  # fmt: skip


def _template_problems(body: CreateTemplate) -> Iterator[Problem]:
    if body.name is not None:
        yield from name_problems(body.name)
    yield from name_problems(body.project, "project")
    yield from label_problems(body.labels)
    yield from timeout_problems(body.timeout_s)
    yield from problems_of(body.spec)
    for field in ("image_id", "auto", "source"):
        if getattr(body.spec, field):
            yield Problem(f"spec.{field}", "is written by the platform, never by a request", "nothing")


def _fork_problems(body: Fork) -> Iterator[Problem]:
    if body.name is not None:
        yield from name_problems(body.name, room=0 if body.count == 1 else 1 + len(str(body.count)))
    yield from label_problems(body.labels)
    if not 1 <= body.count <= MAX_COUNT:
        yield Problem("count", f"{body.count} is out of range", f"1 to {MAX_COUNT}")
    yield from timeout_problems(body.timeout_s)
