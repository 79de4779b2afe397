"""New VMs: a request is resolved (flavor, image, names, addresses), admitted, and written in one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import msgspec

from corral.api.bodies import Accepted, CreateVms
from corral.api.service.ground import Ground, fingerprint_of
from corral.api.service.names import friendly, numbered
from corral.errors import NotFound, Problem, Refused
from corral.model import (
    Cpu,
    Disk,
    Flavor,
    FlavorSpec,
    Image,
    ImagePhase,
    Network,
    Nic,
    Power,
    Task,
    Vm,
    VmSpec,
    Volume,
    VolumeSpec,
)  # fmt: skip
from corral.model.base import Resource
from corral.model.template import serving, unforkable
from corral.model.validate import (
    MAX_COUNT,
    accept,
    label_problems,
    name_problems,
    problems_of,
    refuse,
    timeout_problems,
)  # fmt: skip
from corral.scheduler.place import choose, need_of, sentence
from corral.store.objects import Create, Require, Write
from corral.store.ready import Offer, kind_of
from corral.units import format_size

LIMITS = ("iops", "bandwidth", "iops_burst", "bandwidth_burst")
"""Fields of a disk that say how fast it is."""
OWNED = ("image_id", "template", "boots", "resets", "force")
"""Fields of a VM's spec that the platform writes."""
UNLIMITED = "user-mode networking cannot limit a card's rate; the guest's own traffic control can (tc qdisc)"
TRIES = 8
"""Of finding a free name, or of an image whose record keeps changing (it is being fetched)."""


class Launching(Ground):
    """``create_vms`` and what admission needs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.creating: dict[str, int] = {}  # image id → requests that are about to use it
        self.retiring: set[str] = set()  # ids of images that are about to be deleted

    async def create_vms(self, tree: Any, *, key: str = "", dry_run: bool = False) -> Accepted:
        """VMs after a request body (:class:`CreateVms` as a JSON tree), each with its launch task.

        Raises Invalid, NotFound (project), Refused ``exists``, ``no-capacity``, ``idempotency``, ``wrong-phase``.
        """
        body = accept(CreateVms, tree, "", _body_problems)
        await self.project(body.project)
        fingerprint = fingerprint_of("vms", tree)
        earlier = await self.replay(key, body.project, fingerprint)
        if earlier:
            return await self._answer_again(earlier)
        given = tree["spec"]
        for last in range(TRIES, 0, -1):
            image = await self.image(body.spec.image, body.project)
            self.creating[image.meta.id] = self.creating.get(image.meta.id, 0) + 1
            try:
                return await self._write(body, given, image, key, fingerprint, dry_run=dry_run, last=last == 1)
            except Refused as error:
                earlier = await self.replay(key, body.project, fingerprint)
                if earlier:  # the same request, sent twice at once: the other one won
                    return await self._answer_again(earlier)
                if last == 1 or not (error.code == "stale" or (error.code == "exists" and body.name is None)):
                    raise
            finally:
                self.creating[image.meta.id] -= 1
                if not self.creating[image.meta.id]:
                    del self.creating[image.meta.id]
        raise AssertionError("the last round returns or raises")

    async def _write(
        self, body: CreateVms, given: dict[str, Any], image: Image, key: str, fingerprint: str,
        *, dry_run: bool, last: bool,
    ) -> Accepted:  # fmt: skip
        spec = await self._resolve(body.spec, given, image, body.project)
        names = await self._names(body, crowded=last)
        ready = [] if dry_run or last else await self._ready(body, spec)
        vms = [self._vm(body, spec, name, one) for name, one in zip_longest(names, ready)]
        tasks = [
            self.task("launch", vm, deadline_s=body.timeout_s, key=key, fingerprint=fingerprint, number=number)
            for number, vm in enumerate(vms)
        ]
        writes: list[Write] = [Require(image)]
        for vm, task in zip(vms, tasks, strict=True):
            writes += [Create(vm), *([Create(self._root(vm, image))] if _has_disk(image) else []), Create(task)]
        try:
            await self.admit(vms, image)
            if dry_run:
                await self._refuse_taken_names(vms)
                return Accepted(items=tuple(vms), tasks=tuple(tasks))
            written = await self.commit(writes, taking=[offer.entry for offer in ready])
        except BaseException:
            for vm in vms:
                self.ledger.drop(vm.meta.id)
            raise
        finally:
            if dry_run:
                for vm in vms:
                    self.ledger.drop(vm.meta.id)
        return Accepted(
            items=tuple(obj for obj in written if isinstance(obj, Vm)),
            tasks=tuple(obj for obj in written if isinstance(obj, Task)),
        )

    async def admit(self, vms: list[Vm], image: Image | None) -> None:
        """Book memory for VMs that are to run, or say host by host why that cannot be. Raises ``no-capacity``.

        While a host has not been seen yet (the daemon has just started) nothing is refused: they wait as ``pending``.
        """
        arch = image.spec.arch if image is not None else ""
        where = image.status.host if image is not None else ""
        for vm in vms:
            rooms = await self.ledger.rooms(without=vm.meta.id)
            need = need_of(vm, arch=arch, host=vm.status.host or where)
            host, table = choose(need, rooms)
            if host is not None:
                self.ledger.book(vm, host)
            elif table and not any(room.phase == "unknown" for room in rooms):
                raise Refused(
                    sentence(table), code="no-capacity", hint="stop or delete VMs, or ask for less",
                    hosts=[verdict.as_row() for verdict in table],
                )  # fmt: skip

    async def image(self, ref: str, project: str) -> Image:
        """An image that VMs can be made of, now or when it is ready. Raises NotFound, Refused ``wrong-phase``."""
        try:
            image = await self.objects.find(Image, ref, project)
        except NotFound:
            known = ref in {entry.get("name") for entry in self.offered}
            hint = f"corral image pull {ref}" if known else "see the images there are: corral image list"
            raise NotFound(f"there is no image {ref!a}", hint=hint, field="spec.image") from None
        if image.meta.deleted is not None or image.meta.id in self.retiring:
            raise Refused(f"image {image.meta.name} is being deleted", code="wrong-phase", field="spec.image")
        if image.status.phase is ImagePhase.ERROR:
            raise Refused(
                f"image {image.meta.name} is in phase error: {image.status.reason}", code="wrong-phase",
                hint="delete it and get it again", field="spec.image",
            )  # fmt: skip
        return image

    async def _resolve(self, spec: VmSpec, given: dict[str, Any], image: Image, project: str) -> VmSpec:
        """What the flavor supplies is filled in where nothing was given; the image's demands are checked."""
        if spec.flavor is not None:
            try:
                plan = (await self.objects.find(Flavor, spec.flavor, project)).spec
            except NotFound as error:
                raise NotFound(error.message, hint=error.hint, field="spec.flavor") from None
            cpu = _planned_cpu(spec.cpu, given.get("cpu") or {}, plan)
            planned = msgspec.structs.replace(spec.memory, size=plan.memory)
            memory = spec.memory if "size" in (given.get("memory") or {}) else planned
            disk = _planned_disk(spec.disk, given.get("disk") or {}, plan, image)
            spec = changed_spec(spec, cpu=cpu, memory=memory, disk=disk)
            refuse(problems_of(spec))  # what was given may not go with the plan: a burst below the limit
        refuse([*demands(spec, image), *await self.card_problems(spec, project)])
        nics = tuple(changed_nic(nic, self._mac()) for nic in spec.nics)
        return changed_spec(spec, image_id=image.meta.id, nics=nics, boots=1, resets=0, force=False)

    async def card_problems(self, spec: VmSpec, project: str) -> list[Problem]:
        """What stands against the cards' networks."""
        problems = []
        for number, nic in enumerate(spec.nics):
            where = f"spec.nics[{number}]"
            try:
                network = await self.objects.find(Network, nic.network, project)
            except NotFound:
                problems.append(Problem(f"{where}.network", f"there is no network {nic.network!a}", "user"))
                continue
            if nic.rate is not None and network.spec.mode == "user":
                problems.append(Problem(f"{where}.rate", UNLIMITED, "no rate"))
        return problems

    def _mac(self) -> str:
        return "52:54:00:" + ":".join(f"{byte:02x}" for byte in self.rt.random.token(3))

    async def _ready(self, body: CreateVms, spec: VmSpec) -> list[Offer]:
        """Machines that were made for such VMs ahead: each has the id, and the address, that its VM gets."""
        if unforkable(spec) or spec.power is not Power.RUNNING or any(nic.mac for nic in body.spec.nics):
            return []
        offers = await self.ready.all(kind_of(body.project, serving(spec)))
        return [offer for offer in offers if offer.machine.ready][: body.count]

    def _vm(self, body: CreateVms, spec: VmSpec, name: str, ready: Offer | None = None) -> Vm:
        # Cards of VMs that are made together still get an address each, unless one was asked for.
        nics = tuple(
            changed_nic(nic, self._mac(), anew=not asked.mac)
            for nic, asked in zip(spec.nics, body.spec.nics, strict=True)
        )
        if ready is None:
            return Vm(meta=self.meta(name, body.project, body.labels), spec=changed_spec(spec, nics=nics))
        nics = tuple(changed_nic(nic, ready.machine.mac, anew=True) for nic in nics)
        meta = self.meta(name, body.project, body.labels, ready.machine.id)
        return Vm(meta=meta, spec=changed_spec(spec, nics=nics))

    def _root(self, vm: Vm, image: Image) -> Volume:
        size = vm.spec.disk.size or image.status.virtual_size
        return Volume(
            meta=self.meta(f"{vm.meta.name}-root", vm.meta.project, {}),
            spec=VolumeSpec(size=size, image_id=image.meta.id, vm=vm.meta.id),
        )

    async def _names(self, body: CreateVms, *, crowded: bool) -> list[str]:
        if body.name is not None:
            return [body.name] if body.count == 1 else [f"{body.name}-{n + 1}" for n in range(body.count)]
        names: set[str] = set()
        while len(names) < body.count:
            name = numbered(self.rt.random) if crowded or len(names) > 16 else friendly(self.rt.random)
            names.add(name)
        return sorted(names)

    async def _refuse_taken_names(self, vms: list[Vm]) -> None:
        for vm in vms:
            try:
                found = await self.objects.find(Vm, f"{vm.meta.project}/{vm.meta.name}")
            except NotFound:
                continue
            if found.meta.name == vm.meta.name:
                raise Refused(f"there is a vm {vm.meta.name!a} already", code="exists", field="name")

    async def _answer_again(self, tasks: tuple[Task, ...]) -> Accepted:
        """The answer to a request that was carried out before: its tasks, and what is left of what it made."""
        items: list[Resource] = []
        for task in tasks:
            try:
                items.append(await self.objects.get(Vm, task.spec.target_id))
            except NotFound:
                continue  # deleted since: the task still tells what became of it
        return Accepted(items=tuple(items), tasks=tasks)


def _planned_cpu(cpu: Cpu, given: Mapping[str, Any], plan: FlavorSpec) -> Cpu:
    """What a plan says of CPUs, where the request says nothing."""
    planned = {"count": plan.cpus} | {f: getattr(plan, f) for f in ("weight", "limit", "reserve", "burst")}
    return msgspec.structs.replace(cpu, **{field: value for field, value in planned.items() if field not in given})


def _planned_disk(disk: Disk, given: Mapping[str, Any], plan: FlavorSpec, image: Image) -> Disk:
    """What a plan says of the disk, where the request says nothing.

    An image that is larger keeps its own size; one without a disk has nothing to plan.
    """
    if not _has_disk(image):
        return disk
    small = plan.disk is not None and image.status.phase is ImagePhase.READY and plan.disk < image.status.virtual_size
    planned = {
        "size": None if small else plan.disk, "iops": plan.disk_iops, "bandwidth": plan.disk_bandwidth,
        "iops_burst": plan.disk_iops_burst, "bandwidth_burst": plan.disk_bandwidth_burst, "burst_s": plan.disk_burst_s,
    }  # fmt: skip
    return msgspec.structs.replace(disk, **{field: value for field, value in planned.items() if field not in given})


def changed_spec(spec: VmSpec, **fields: Any) -> VmSpec:
    return msgspec.structs.replace(spec, **fields)


def changed_nic(nic: Nic, mac: str, *, anew: bool = False) -> Nic:
    return msgspec.structs.replace(nic, mac=mac if anew or not nic.mac else nic.mac.lower())


def demands(spec: VmSpec, image: Image) -> Iterator[Problem]:
    """What an image asks of a VM that boots it."""
    status = image.status
    if status.min_memory > spec.memory.size:
        shown = format_size(spec.memory.size)
        yield Problem(
            "spec.memory.size",
            f"{shown} is too little for {image.meta.name}",
            f"at least {format_size(status.min_memory)}",
        )
    if not _has_disk(image):
        for field in LIMITS:
            if getattr(spec.disk, field) is not None:
                yield Problem(f"spec.disk.{field}", f"image {image.meta.name} has no disk", "no limit")
    if spec.disk.size is None or status.phase is not ImagePhase.READY:
        return
    if not status.virtual_size:
        yield Problem("spec.disk.size", f"image {image.meta.name} has no disk", "no size")
    elif spec.disk.size < status.virtual_size:
        least = f"at least {status.virtual_size} bytes ({format_size(status.virtual_size)})"
        yield Problem(
            "spec.disk.size", f"{format_size(spec.disk.size)} is less than the disk of {image.meta.name}", least
        )


def owned_problems(spec: VmSpec, was: VmSpec) -> Iterator[Problem]:
    """Fields of the platform's that differ from what they were."""
    for field in OWNED:
        if getattr(spec, field) != getattr(was, field):
            yield Problem(f"spec.{field}", "is written by the platform, never by a request", "nothing")


def _body_problems(body: CreateVms) -> Iterator[Problem]:
    if body.name is not None:
        yield from name_problems(body.name, room=0 if body.count == 1 else 1 + len(str(body.count)))
    yield from name_problems(body.project, "project")
    yield from label_problems(body.labels)
    if not 1 <= body.count <= MAX_COUNT:
        yield Problem("count", f"{body.count} is out of range", f"1 to {MAX_COUNT}")
    yield from timeout_problems(body.timeout_s)
    yield from problems_of(body.spec)
    yield from owned_problems(body.spec, VmSpec(image=body.spec.image))
    if body.count > 1:
        for number, nic in enumerate(body.spec.nics):
            if nic.mac:
                yield Problem(f"spec.nics[{number}].mac", "several VMs cannot share it", "no address, or count 1")
            for place, port in enumerate(nic.publish):
                if port.host:
                    where = f"spec.nics[{number}].publish[{place}].host"
                    yield Problem(where, f"several VMs cannot have port {port.host}", "0: each gets a port of its own")


def _has_disk(image: Image) -> bool:
    """Whether its VMs get a root volume. Of images that are not here yet only micro is known to have none."""
    if image.status.phase is ImagePhase.READY:
        return image.status.virtual_size > 0
    return not (image.spec.source == "build" and image.spec.recipe == "micro")
