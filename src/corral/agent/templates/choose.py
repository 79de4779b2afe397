"""Fork or boot? Pure: a VM, its image's files, the templates there are → the template, or why it boots.

What can be done after a fork is done after (names, keys, addresses, published ports); what lies in the memory that is
shared (image, CPUs, memory, devices) must be exactly what was asked for; what only a first boot does means a boot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from corral.agent.ports import BootFiles
from corral.model import Template, TemplatePhase, TemplateSpec, Vm
from corral.model.template import hardware_of, serving, unforkable
from corral.model.vm import start_of
from corral.units import format_size


class Choice(NamedTuple):
    """``template``: to be forked from; None: ``why`` it boots. ``wanted``: a template would have served it."""

    template: Template | None = None
    why: str = ""
    wanted: bool = False


def first_start(vm: Vm) -> bool:
    """It has never been up: whatever is on its disk is not its own yet. A fork begins again until it is somebody."""
    start = start_of(vm)
    return not start.done and (vm.status.boots == 0 or start.how == "fork")


def must_boot(vm: Vm, files: BootFiles) -> str:
    """Why a VM cannot be forked, whatever templates there are; empty: it can."""
    if not first_start(vm):
        return "it has a disk of its own"
    if not files.agent:
        return "its image has no corral-guest to tell it who it is"
    return unforkable(vm.spec)


def choose(vm: Vm, files: BootFiles, hardware: str, templates: Iterable[Template]) -> Choice:
    """The template of a launch. ``hardware``: the digest of the machine that it asks for."""
    why = must_boot(vm, files)
    if why:
        return Choice(why=why)
    same = [
        one for one in templates
        if one.meta.project == vm.meta.project and one.meta.deleted is None and not one.spec.source
        and one.spec.image_id == vm.spec.image_id
    ]  # fmt: skip
    fitting = [one for one in same if alike(one.spec, serving(vm.spec))]
    ready = [one for one in fitting if one.status.phase is TemplatePhase.READY and one.status.digest == files.digest]
    exact = [one for one in ready if one.status.hardware == hardware]
    if exact:
        return Choice(max(exact, key=lambda one: (one.status.used_at or 0.0, one.meta.id)))
    if ready:
        return Choice(why=f"template {ready[0].meta.name} has other hardware", wanted=True)
    if fitting:
        one = fitting[0]
        return Choice(why=f"template {one.meta.name} is {one.status.phase}")
    size = f"{vm.spec.cpu.count} CPU, {format_size(vm.spec.memory.size)}" + ("" if vm.spec.nics else " and no card")
    return Choice(why=f"there is no template of {vm.spec.image} with {size}", wanted=True)


def alike(one: TemplateSpec, other: TemplateSpec) -> bool:
    """Whether two templates are of the same machine."""
    return hardware_of(one) == hardware_of(other)
