"""A flavor: a plan of CPUs, memory and disk that VMs are made after."""

from __future__ import annotations

from typing import ClassVar

from corral.model.base import Resource, Struct


class FlavorSpec(Struct, frozen=True, kw_only=True):
    cpus: int = 1
    memory: int
    """Bytes."""
    disk: int | None = None
    """Bytes of the root disk; None keeps the image's size."""
    weight: int = 100
    """As a VM's ``cpu.weight``."""
    limit: float | None = None
    """As a VM's ``cpu.limit``: cores."""
    reserve: float = 0.0
    """As a VM's ``cpu.reserve``: cores."""
    disk_iops: int | None = None
    """As a VM's ``disk.iops``."""
    disk_bandwidth: int | None = None
    """As a VM's ``disk.bandwidth``: bytes a second."""
    disk_iops_burst: int | None = None
    """As a VM's ``disk.iops_burst``."""
    disk_bandwidth_burst: int | None = None
    """As a VM's ``disk.bandwidth_burst``: bytes a second."""
    disk_burst_s: int = 10
    """As a VM's ``disk.burst_s``."""
    burst: float = 0.0
    """As a VM's ``cpu.burst``: CPU-seconds."""


class Flavor(Resource, frozen=True, kw_only=True, tag_field="kind", tag="flavor"):
    KIND: ClassVar[str] = "flavor"
    spec: FlavorSpec
