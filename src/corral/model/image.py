"""An image: something VMs boot from, immutable by content."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Literal

from corral.model.base import Resource, Struct


class ImagePhase(StrEnum):
    """Where an image is on its way in."""

    PENDING = "pending"
    FETCHING = "fetching"
    BUILDING = "building"
    CHECKING = "checking"
    READY = "ready"
    ERROR = "error"


class ImageSpec(Struct, frozen=True, kw_only=True):
    """Where it comes from and what it is."""

    source: Literal["build", "catalogue", "url", "upload"] = "upload"
    recipe: str = ""
    """``build``: micro or debian. ``catalogue``: the entry's name, like ``debian-13``."""
    url: str = ""
    """``url`` (or the mirror of a catalogue entry): https, or http to loopback."""
    checksum: str = ""
    """``sha256:…`` or ``sha512:…`` of the file as fetched."""
    format: Literal["", "raw", "qcow2", "vmdk", "iso"] = ""
    """Declared format of an upload or url. Never probed; empty only for builds and the catalogue."""
    arch: Literal["x86_64", "aarch64", "riscv64"] = "x86_64"
    firmware: Literal["bios", "uefi"] = "bios"
    description: str = ""


class ImageStatus(Struct, frozen=True, kw_only=True):
    phase: ImagePhase = ImagePhase.PENDING
    reason: str = ""
    digest: str = ""
    """sha256 of the content as stored: the image's directory name."""
    recipe: str = ""
    """Of one that was built: digest of its recipe and of the corral-guest in it."""
    size: int = 0
    """Bytes on disk."""
    virtual_size: int = 0
    """Bytes the guest sees; 0 when the image has no disk."""
    boot: Literal["", "kernel", "disk", "cdrom"] = ""
    received: int = 0
    """Bytes fetched so far."""
    total: int = 0
    min_memory: int = 0
    agent: bool = False
    """corral-guest is inside."""
    default_user: str = "root"
    host: str = ""


class Image(Resource, frozen=True, kw_only=True, tag_field="kind", tag="image"):
    KIND: ClassVar[str] = "image"
    spec: ImageSpec
    status: ImageStatus = ImageStatus()
