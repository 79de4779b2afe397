"""A host: a machine that runs VMs."""

from __future__ import annotations

from typing import ClassVar

from corral.model.base import Resource, Struct


class Accelerator(Struct, frozen=True, kw_only=True):
    """What the probe found about one way of running guests. ``works`` only if a tiny guest really ran."""

    name: str
    """``kvm`` or ``tcg``."""
    works: bool
    reason: str = ""
    """What was tried and seen, in a sentence."""
    probed_at: float = 0.0


class HostSpec(Struct, frozen=True, kw_only=True):
    cordoned: bool = False
    """No new placements."""
    memory_budget: int | None = None
    """Bytes that VMs may take together, their QEMUs included; None: all but what the host keeps for itself."""
    memory_overcommit: float = 1.0
    """How much more than the budget VMs may be given on paper, like 1.5; what they reserve is never more than it."""


class HostStatus(Struct, frozen=True, kw_only=True):
    """Facts, written by the host's agent."""

    phase: str = "unknown"
    """``ready``, ``down`` or ``unknown``."""
    arch: str = ""
    cpus: int = 0
    memory: int = 0
    """Bytes of RAM."""
    memory_reserved: int = 0
    """Bytes the host keeps for itself."""
    overhead: int = 0
    """Bytes that each VM costs beyond its guest memory; 0 where it was not measured."""
    disk_free: int = 0
    kernel: str = ""
    os: str = ""
    accelerator: str = ""
    """The one that VMs get."""
    accelerators: tuple[Accelerator, ...] = ()
    engine: str = ""
    """Hypervisor and version, like ``QEMU 7.2.22``."""
    privileged: bool = False
    limits: dict[str, str] = {}
    """Resource → how what VMs are given of it is enforced here, and what is missing, in words."""
    boot_id: str = ""
    seen_at: float = 0.0


class Host(Resource, frozen=True, kw_only=True, tag_field="kind", tag="host"):
    KIND: ClassVar[str] = "host"
    spec: HostSpec = HostSpec()
    status: HostStatus = HostStatus()
