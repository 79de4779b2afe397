"""A volume: a disk of a VM. Root volumes are made and deleted with their VM."""

from __future__ import annotations

from typing import ClassVar

from corral.model.base import Resource, Struct


class VolumeSpec(Struct, frozen=True, kw_only=True):
    size: int = 0
    """Bytes the guest sees."""
    image_id: str = ""
    vm: str = ""
    """Id of the VM that it belongs to."""


class VolumeStatus(Struct, frozen=True, kw_only=True):
    phase: str = "pending"
    """``pending``, ``ready`` or ``error``."""
    reason: str = ""
    host: str = ""
    used: int = 0
    """Bytes on disk."""


class Volume(Resource, frozen=True, kw_only=True, tag_field="kind", tag="volume"):
    KIND: ClassVar[str] = "volume"
    spec: VolumeSpec
    status: VolumeStatus = VolumeStatus()
