"""The catalogue: well-known cloud images by name. The data stands in ``catalogue.toml`` beside this file."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from corral.errors import NotFound, Refused

_FILE = Path(__file__).with_name("catalogue.toml")
_BARE = re.compile(r"[0-9a-f]+", re.ASCII)


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One distribution's image, in all its architectures."""

    title: str
    url: str
    checksums: str
    kind: Literal["sha256", "sha512"] = "sha256"
    archs: dict[str, str]
    user: str
    min_memory_mib: int
    format: Literal["qcow2"] = "qcow2"
    firmware: dict[str, Literal["bios", "uefi"]] = {}
    """By architecture, where it is not the usual one: BIOS on x86_64, UEFI elsewhere."""


class Listed(NamedTuple):
    """An entry for one architecture, addresses complete."""

    name: str
    title: str
    arch: str
    url: str
    checksums: str
    kind: Literal["sha256", "sha512"]
    user: str
    min_memory_mib: int
    format: Literal["qcow2"]
    firmware: Literal["bios", "uefi"]


@functools.cache
def entries() -> dict[str, Entry]:
    """The whole catalogue, by name."""
    return msgspec.toml.decode(_FILE.read_bytes(), type=dict[str, Entry])


def catalogue() -> list[Listed]:
    """Every image for every architecture, sorted."""
    return [find(name, arch) for name, entry in sorted(entries().items()) for arch in sorted(entry.archs)]


def find(name: str, arch: str) -> Listed:
    """One image. Raises NotFound for an unknown name, Refused for an architecture it does not come in."""
    entry = entries().get(name)
    if entry is None:
        raise NotFound(f"the catalogue has no image {name[:60]!a}", hint=f"known: {', '.join(sorted(entries()))}")
    word = entry.archs.get(arch)
    if word is None:
        raise Refused(
            f"{entry.title} does not come for {arch}", code="unsupported", hint=f"there is: {', '.join(entry.archs)}"
        )
    return Listed(
        name=name,
        title=entry.title,
        arch=arch,
        url=entry.url.format(arch=word),
        checksums=entry.checksums.format(arch=word),
        kind=entry.kind,
        user=entry.user,
        min_memory_mib=entry.min_memory_mib,
        format=entry.format,
        firmware=entry.firmware.get(arch, "bios" if arch == "x86_64" else "uefi"),
    )


def checksum_in(text: str, file_name: str, kind: Literal["sha256", "sha512"]) -> str:
    """The checksum of ``file_name`` in a checksum list, as ``sha256:…``. Raises NotFound when it is not in there."""
    length = {"sha256": 64, "sha512": 128}[kind]
    name = re.escape(file_name)
    forms = (
        rf"^([0-9a-fA-F]{{{length}}})[ \t]+\*?(?:\./)?{name}[ \t]*$",  # GNU coreutils
        rf"^{kind.upper()}[ \t]*\({name}\)[ \t]*=[ \t]*([0-9a-fA-F]{{{length}}})[ \t]*$",  # BSD
    )
    for form in forms:
        found = re.search(form, text, re.MULTILINE | re.ASCII)
        if found:
            return f"{kind}:{found[1].lower()}"
    bare = text.strip().lower()
    if len(bare) == length and _BARE.fullmatch(bare):
        return f"{kind}:{bare}"
    raise NotFound(f"the checksum list does not name {file_name}")
