"""What all kinds share: flavors made, specs and labels patched, objects removed; and what is there from the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from corral.api.bodies import Change, CreateFlavor
from corral.api.service.ground import ROUNDS, bumped, changed, key_id
from corral.api.service.launch import demands, owned_problems
from corral.api.service.templates import Templating
from corral.errors import NotFound, Problem, Refused
from corral.model import (
    Flavor,
    FlavorSpec,
    Meta,
    Network,
    NetworkSpec,
    Power,
    Project,
    ProjectSpec,
    Vm,
    VmSpec,
    Volume,
)  # fmt: skip
from corral.model.base import Resource
from corral.model.kinds import kind_of
from corral.model.patch import merge
from corral.model.shape import read, to_tree
from corral.model.validate import accept, label_problems, name_problems, problems_of, refuse
from corral.store.objects import Create, Update
from corral.units import GIB, MIB, format_size

PATCHABLE = ("vm", "image", "flavor", "host", "network", "project")
"""Kinds whose labels and spec users change; the others are records of what happened."""
FIXED: dict[str, tuple[str, ...]] = {
    "vm": ("image", "flavor"),
    "image": ("source", "recipe", "url", "checksum", "format", "arch", "firmware"),
    "network": ("mode", "cidr"),
}
"""Fields that may not change after creation."""
FLAVORS: dict[str, FlavorSpec] = {
    "tiny": FlavorSpec(cpus=1, memory=128 * MIB),
    "small": FlavorSpec(cpus=1, memory=512 * MIB, disk=5 * GIB),
    "medium": FlavorSpec(cpus=2, memory=2 * GIB, disk=20 * GIB),
    "large": FlavorSpec(cpus=4, memory=8 * GIB, disk=40 * GIB),
    "xlarge": FlavorSpec(cpus=8, memory=16 * GIB, disk=80 * GIB),
}


class Changing(Templating):
    """``create``, ``patch``, ``delete`` for kinds without ways of their own, and ``ensure_defaults``."""

    async def ensure_defaults(self) -> None:
        """Project ``default``, network ``user`` and the flavors, once for ever: what is deleted later stays away."""
        try:
            await self.objects.find(Project, "default")
            return
        except NotFound:
            pass
        network = NetworkSpec(description="QEMU's own NAT: out to everywhere, in through published ports")
        first: list[Resource] = [
            Project(
                meta=self.meta("default", "default", {}), spec=ProjectSpec(description="where things are by default")
            ),
            Network(meta=self.meta("user", "default", {}), spec=network),
            *(Flavor(meta=self.meta(name, "default", {}), spec=spec) for name, spec in FLAVORS.items()),
        ]
        try:
            await self.objects.commit([Create(obj) for obj in first])
        except Refused as error:
            if error.code != "exists":  # somebody else did it in the same moment
                raise

    async def create_flavor(self, tree: Any, *, key: str = "") -> Flavor:
        """A flavor after a body (:class:`CreateFlavor` as a JSON tree). Raises Invalid, Refused ``exists``."""
        body = accept(CreateFlavor, tree, "", _flavor_problems)
        await self.project(body.project)
        await self.replay(key, "default", "")  # refuses a malformed key, and one that made tasks
        # An idempotency key gives the id: the same request again finds what it made.
        id = key_id("flavor", key, 0) if key else ""
        flavor = Flavor(meta=self.meta(body.name, "default", body.labels, id), spec=body.spec)
        try:
            (made,) = await self.objects.create(flavor)
        except Refused:
            made = await self._made_before(flavor, key)
        return made

    async def _made_before(self, flavor: Flavor, key: str) -> Flavor:
        exists = Refused(
            f"there is a flavor {flavor.meta.name!r} already", code="exists", field="name", hint="choose another name"
        )
        if not key:
            raise exists
        try:
            found = await self.objects.get(Flavor, flavor.meta.id)
        except NotFound:
            raise exists from None
        if (found.meta.name, found.spec, found.meta.labels) != (flavor.meta.name, flavor.spec, flavor.meta.labels):
            raise Refused("this idempotency key was used for another request", code="idempotency")
        return found

    async def patch(
        self, kind: str, ref: str, tree: Any, *, project: str = "default", revision: int | None = None,
        dry_run: bool = False,
    ) -> Resource:  # fmt: skip
        """Merge labels and spec into an object (body: :class:`~corral.api.bodies.Change`, RFC 7386).

        ``revision``: only if the object still has it (``stale``). What a running VM's new spec changes takes effect at
        once or at its next boot (:mod:`corral.model.effect`). Raises Invalid, NotFound, Refused.
        """
        assert kind in PATCHABLE, kind
        body = accept(Change, tree, "", lambda _: iter(()))
        cls = kind_of(kind).cls
        found: Resource = await self.objects.find(cls, ref, project)
        for _ in range(ROUNDS):
            if revision is not None and found.meta.revision != revision:
                raise Refused(
                    f"{kind} {found.meta.name} has changed since it was read", code="stale", hint="read it again",
                    revision=found.meta.revision,
                )  # fmt: skip
            wanted: Resource = await self._merged(found, body)
            if dry_run:
                self.ledger.put(found)  # what was booked to try it counts for nothing
            if wanted == found or dry_run:
                return wanted
            try:
                updated, *_ = await self.objects.commit([Update(wanted), *await self._grown(found, wanted)])
                self.ledger.put(updated)
                return updated
            except Refused as error:
                if error.code != "stale":
                    raise
            found = await self.objects.get(cls, found.meta.id)
        raise Refused("the object kept changing while it was being written", code="conflict", hint="try again")

    async def _merged(self, obj: Any, body: Change) -> Any:
        if obj.meta.deleted is not None:
            raise Refused(f"{obj.meta.name} is being deleted", code="wrong-phase")
        labels = merge(obj.meta.labels, body.labels)
        before = to_tree(obj.spec)
        spec, problems = read(type(obj.spec), merge(before, body.spec), "spec")
        if not problems:
            problems += [*label_problems(labels), *problems_of(spec), *_fixed(obj.KIND, before, to_tree(spec))]
            if isinstance(spec, VmSpec):
                problems += owned_problems(spec, obj.spec)
        refuse(problems)
        if isinstance(obj, Vm):
            await self._check_vm(obj, spec)
        meta: Meta = obj.meta if spec == obj.spec else bumped(obj.meta)
        return changed(obj, meta=msgspec.structs.replace(meta, labels=labels), spec=spec)

    async def _check_vm(self, vm: Vm, spec: VmSpec) -> None:
        """A changed spec must suit the image, the networks and, where it asks for more memory to run, the hosts."""
        image = await self._image_of(vm)
        problems = [*_shrunk(vm.spec, spec), *([] if image is None else demands(spec, image))]
        for number, nic in enumerate(spec.nics):
            if not nic.mac:
                problems.append(Problem(f"spec.nics[{number}].mac", "is missing", "the card's address, or a new one"))
        refuse(problems + await self.card_problems(spec, vm.meta.project))
        starts = vm.spec.power is Power.STOPPED and spec.power is not Power.STOPPED
        more = spec.memory.size > vm.spec.memory.size or (spec.memory.reserve or 0) > (vm.spec.memory.reserve or 0)
        if spec.power is not Power.STOPPED and (starts or more):
            await self.admit([changed(vm, spec=spec)], image)

    async def _grown(self, before: Resource, after: Resource) -> list[Update]:
        """A VM's root volume is as large as its spec says."""
        if not isinstance(before, Vm) or not isinstance(after, Vm) or before.spec.disk.size == after.spec.disk.size:
            return []
        volumes = (await self.objects.list(Volume, before.meta.project)).items
        assert after.spec.disk.size is not None, "a disk never shrinks, not even to its image's size"
        size = after.spec.disk.size
        return [
            Update(changed(volume, spec=msgspec.structs.replace(volume.spec, size=size)))
            for volume in volumes
            if volume.spec.vm == before.meta.id
        ]

    async def delete(self, kind: str, ref: str, *, project: str = "default", revision: int | None = None) -> None:
        """Remove an object of a kind that owns nothing (flavors). Images and VMs have ways of their own."""
        found: Resource = await self.objects.find(kind_of(kind).cls, ref, project)
        if revision is not None and found.meta.revision != revision:
            raise Refused(f"{kind} {found.meta.name} has changed", code="stale", hint="read it again")
        await self.objects.delete(found)


def _shrunk(before: VmSpec, after: VmSpec) -> Iterator[Problem]:
    """A disk that would become smaller: what is beyond its end would be lost."""
    had = before.disk.size
    if had is not None and (after.disk.size is None or after.disk.size < had):
        yield Problem("spec.disk.size", "a disk never shrinks", f"at least {had} bytes ({format_size(had)})")


def _fixed(kind: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Problem]:
    for field in FIXED.get(kind, ()):
        if before[field] != after[field]:
            yield Problem(f"spec.{field}", f"may not change after the {kind} is made", "what it was")


def _flavor_problems(body: CreateFlavor) -> Iterator[Problem]:
    yield from name_problems(body.name)
    yield from label_problems(body.labels)
    yield from problems_of(body.spec)
