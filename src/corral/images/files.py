"""What an image is on disk: one directory per digest, immutable, described by its manifest.

    images/<digest>/manifest.json   what follows from it is here, nowhere else
                    kernel, initrd  boot = "kernel"
                    disk.qcow2      root disk (boot = "disk", or the root of a kernel boot)
                    disk.iso        boot = "cdrom"

Directories are 0711 and files 0444: VM processes run as other users and open them by path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (step, done, total): a verb phrase for people, and two counts of one unit; total 0 is unknown."""

Boot: TypeAlias = Literal["kernel", "disk", "cdrom"]
PARTS = ("kernel", "initrd", "disk.qcow2", "disk.iso")
MANIFEST = "manifest.json"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an image."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about an image but its place."""

    name: str
    arch: str
    boot: Boot
    firmware: Literal["bios", "uefi"] = "bios"
    cmdline: str = ""
    virtual_size: int = 0
    """Bytes of disk that the guest sees; 0 without a disk."""
    min_memory: int = 0
    """Bytes below which it does not boot."""
    agent: bool = False
    """corral-guest is inside."""
    default_user: str = "root"
    parts: dict[str, Part] = {}

    @property
    def digest(self) -> str:
        """The image's identity: sha256 over its description, which holds the sha256 of each file."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.parts.values())


class ImageFiles(msgspec.Struct, frozen=True, kw_only=True):
    """An image that is ready to boot from: absolute paths and what to do with them."""

    digest: str
    name: str
    arch: str
    boot: Boot
    firmware: Literal["bios", "uefi"]
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    disk: Path | None
    disk_format: Literal["qcow2", "raw"]
    """``raw`` is an ISO (boot = "cdrom")."""
    virtual_size: int
    min_memory: int
    agent: bool
    default_user: str
    size: int

    @classmethod
    def at(cls, directory: Path, digest: str, manifest: Manifest) -> ImageFiles:
        """The files of the image in ``directory``."""
        path = {name: directory / name for name in PARTS if name in manifest.parts}
        return cls(
            digest=digest,
            name=manifest.name,
            arch=manifest.arch,
            boot=manifest.boot,
            firmware=manifest.firmware,
            kernel=path.get("kernel"),
            initrd=path.get("initrd"),
            cmdline=manifest.cmdline,
            disk=path.get("disk.qcow2") or path.get("disk.iso"),
            disk_format="raw" if "disk.iso" in path else "qcow2",
            virtual_size=manifest.virtual_size,
            min_memory=manifest.min_memory,
            agent=manifest.agent,
            default_user=manifest.default_user,
            size=manifest.size,
        )
