"""A template: a booted VM frozen, so that others fork from it in a fraction of a second. Shared within its project."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Literal

from corral.model.base import Resource, Struct
from corral.model.vm import VmSpec
from corral.units import GIB, MIB


class TemplatePhase(StrEnum):
    """Where a template is. Only a ``ready`` one is forked from."""

    PENDING = "pending"
    BUILDING = "building"
    READY = "ready"
    STALE = "stale"
    """This host, its QEMU or the image is no longer what it was made with."""
    LOST = "lost"
    """It was found on the host and no record told of it, so nobody knows whose it is: nothing is forked from it."""
    ERROR = "error"


class TemplateSpec(Struct, frozen=True, kw_only=True):
    """The VM that is booted once and frozen. A launch that asks for exactly this is forked."""

    image: str
    """Short name of the image; resolved to ``image_id`` when the template is created."""
    image_id: str = ""
    cpus: int = 1
    cpu_model: str | None = None
    memory: int = 512 * MIB
    """Bytes, a multiple of 1 MiB."""
    disk: int | None = None
    """Bytes of the root disk; None keeps the image's own size."""
    firmware: Literal["auto", "bios", "uefi"] = "auto"
    cards: int = 1
    """Network cards: 0 or 1."""
    auto: bool = False
    """Made by the platform, and removed by it: the one that was used least recently goes first."""
    source: str = ""
    """Id of the running VM that it was frozen from; empty: one was booted for it."""


class TemplateStatus(Struct, frozen=True, kw_only=True):
    """What is seen, written by the agent of its host."""

    phase: TemplatePhase = TemplatePhase.PENDING
    reason: str = ""
    host: str = ""
    digest: str = ""
    """Content of the image it was booted from."""
    hardware: str = ""
    """Digest of all that a fork must have in common with it."""
    memory: int = 0
    """Bytes of this host's memory that it holds, once for all its forks."""
    disk: int = 0
    """Bytes of its files."""
    pause_s: float | None = None
    """How long the VM that it was frozen from stood still."""
    made_at: float | None = None
    used_at: float | None = None
    """Wall time of the last fork."""
    forks: int = 0
    """VMs forked from it that run now."""
    warm: int = 0
    """Forks of it that are made already and wait for a launch."""
    agent: str = ""
    """Who answered inside: ``corral-guest`` or ``qemu-guest-agent``."""
    hooks: bool = False
    """Its image has programs in ``/etc/corral/on-fork.d``, which each fork runs."""


class Template(Resource, frozen=True, kw_only=True, tag_field="kind", tag="template"):
    KIND: ClassVar[str] = "template"
    spec: TemplateSpec
    status: TemplateStatus = TemplateStatus()


def memory_of(template: Template) -> int:
    """Bytes of its host's memory that it takes now; while it is made, with what the guest that was booted for it has:
    its memory is copied out of that guest.
    """
    spec, status = template.spec, template.status
    if status.phase in (TemplatePhase.PENDING, TemplatePhase.ERROR):
        return 0
    size = status.memory or spec.memory
    return size * making_takes(spec) if status.phase is TemplatePhase.BUILDING else size


def making_takes(spec: TemplateSpec) -> int:
    """How many times its memory the making of a template takes. A VM that is frozen is counted by itself."""
    return 1 if spec.source else 2


def default_name(spec: TemplateSpec) -> str:
    """``debian-1x512m``: what a template is called when nobody says."""
    size = f"{spec.memory // GIB}g" if spec.memory % GIB == 0 else f"{spec.memory // MIB}m"
    return f"{spec.image.rpartition('/')[2][:40]}-{spec.cpus}x{size}"


def hardware_of(spec: TemplateSpec) -> tuple[object, ...]:
    """What two templates of the same machine have in common."""
    return spec.image_id, spec.cpus, spec.cpu_model, spec.memory, spec.disk, spec.firmware, spec.cards


def serving(spec: VmSpec) -> TemplateSpec:
    """The template that would serve a VM."""
    return TemplateSpec(
        image=spec.image, image_id=spec.image_id, cpus=spec.cpu.count, cpu_model=spec.cpu.model,
        memory=spec.memory.size, disk=spec.disk.size, firmware=spec.firmware, cards=len(spec.nics), auto=True,
    )  # fmt: skip


def unforkable(spec: VmSpec) -> str:
    """Why what is asked for cannot be forked, whatever templates there are; empty: it can."""
    if spec.cold:
        return "it was asked for"
    if spec.user_data:
        return "its user data runs at a first boot"
    if len(spec.nics) > 1:
        return f"it has {len(spec.nics)} cards; a fork can be given one address"
    return ""
