"""The disks of VMs: ``vms/<id>/root.qcow2`` over the image, ``vms/<id>/seed.iso``.

Every call may be repeated and survives a kill: a file is made under a temporary name, made durable, and renamed; what
exists under its final name is whole. The base is an image file that never changes.

Freezing a VM puts a layer on top: ``root-2.qcow2`` over ``root.qcow2``, and so on; the highest number is written to. A
fork begins with ``base-1.qcow2`` …, hard links of its template's layers, so that these live as long as anybody needs
them and nobody has to count. The directory's listing is the chain: there is nothing else that could be lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from corral.errors import CorralError, Refused, from_system
from corral.runtime import Runtime
from corral.storage.qemu_img import QemuImg
from corral.storage.seed import Seed, check_seed, seed_iso
from corral.units import GIB, KIB, format_size

ROOT, SEED = "root.qcow2", "seed.iso"
_TEMPORARY = ".new-"
_LAYER = re.compile(r"(base|root)(?:-([1-9][0-9]*))?\.qcow2", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
SEED_BLOCK = 128 * KIB
"""A seed takes 80 KiB, most of it the CD's own: one of these has room for many more keys than there were at first."""
BLANK_SIZE = 10 * GIB
"""Root disk of a VM that boots an installer CD, when no size is asked for."""


class Base(Protocol):
    """What a root volume needs to know of an image (:class:`corral.images.files.ImageFiles` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def disk(self) -> Path | None: ...
    @property
    def disk_format(self) -> Literal["qcow2", "raw"]: ...
    @property
    def boot(self) -> Literal["kernel", "disk", "cdrom"]: ...
    @property
    def virtual_size(self) -> int: ...


class Volumes:
    """The disks under ``root`` (CORRAL_STATE/vms)."""

    def __init__(self, root: Path, rt: Runtime, qemu_img: QemuImg | None = None) -> None:
        self._root, self._rt = root, rt
        self._qemu_img = qemu_img or QemuImg()

    def path(self, vm_id: str) -> Path:
        """The VM's directory (made when missing)."""
        if not _ID.fullmatch(vm_id):
            raise CorralError(f"{vm_id[:80]!a} is not the id of a VM")
        self._root.mkdir(mode=0o711, parents=True, exist_ok=True)
        path = self._root / vm_id
        path.mkdir(mode=0o711, exist_ok=True)
        return path

    async def ensure_root(self, vm_id: str, base: Base, size: int | None, *, new: bool = True) -> Path:
        """Have the VM's root disk: an overlay of ``size`` bytes (None: the image's size) over the image's disk.

        One that exists is kept, and grown when ``size`` is larger; never shrunk. An image on CD gets an empty disk.
        Raises Refused when ``size`` is below the image's, the image has no disk, or there is none although it is not
        ``new``: a VM that has booted before must not find an empty disk in place of its own.
        """
        if base.disk is None:
            raise Refused(f"the image {base.name} has no disk", code="unsupported")
        if size is not None and base.boot != "cdrom" and size < base.virtual_size:
            least = format_size(base.virtual_size)
            raise Refused(
                f"the disk of image {base.name} has {least}", field="spec.disk.size", hint=f"at least {least}"
            )
        if new and any(layer.name.startswith("base") for layer in self.layers(vm_id)):
            for left in self.layers(vm_id):  # of a fork that was begun and given up: nothing in it is this VM's own
                left.unlink()
        target = self.layers(vm_id)[0] if self._own(vm_id) else self.path(vm_id) / ROOT
        if target.exists():
            present = (await self._qemu_img.info(target, "qcow2")).virtual_size
            if size is not None and size > present:
                await self._qemu_img.grow(target, "qcow2", size)
            return target
        if not new:
            hint = "bring the file back from a backup and start the VM again, or delete the VM"
            raise Refused(f"its disk {target} is gone", code="failed", hint=hint)
        with self._replacing(target) as made:
            if base.boot == "cdrom":
                await self._qemu_img.create(made, size or BLANK_SIZE)
            else:
                await self._qemu_img.create_overlay(made, base.disk, base.disk_format, size)
            made.chmod(0o600)
        return target

    async def ensure_fork(self, vm_id: str, bases: Sequence[Path], size: int | None) -> Path:
        """Have a fresh root disk over links of ``bases`` (a template's layers, the uppermost first).

        Whatever the VM had before goes: a fork that never got as far as being somebody begins again.
        """
        directory = self.path(vm_id)
        for left in self.layers(vm_id):
            left.unlink()
        links = [directory / f"base-{number}.qcow2" for number in range(len(bases), 0, -1)]
        for link, base in zip(links, bases, strict=True):
            os.link(base, link)
        target = directory / ROOT
        with self._replacing(target) as made:
            await self._qemu_img.create_overlay(made, links[0], "qcow2", size)
            made.chmod(0o600)
        return target

    async def next_layer(self, vm_id: str, over: Path) -> tuple[Path, ...]:
        """Have a fresh layer over ``over``, which the VM writes to, and give all its layers then, the uppermost first.

        One that was made before is given again: whoever asked for it did not use it.
        """
        layers = self.layers(vm_id)
        if over.name not in (layer.name for layer in layers[:2]):
            raise CorralError(f"{vm_id} writes to {over.name}, which is not one of its last layers", code="failed")
        if layers[0].name != over.name:
            return layers
        target = self.path(vm_id) / f"root-{_number(over) + 1}.qcow2"
        with self._replacing(target) as made:
            await self._qemu_img.create_overlay(made, layers[0], "qcow2", None)
            made.chmod(0o600)
        return target, *layers

    def layers(self, vm_id: str) -> tuple[Path, ...]:
        """The VM's own layers, the uppermost first; without the image that is under all of them."""
        found = [path for path in self.path(vm_id).iterdir() if _LAYER.fullmatch(path.name)]
        return tuple(sorted(found, key=lambda path: (path.name.startswith("root"), _number(path)), reverse=True))

    def _own(self, vm_id: str) -> bool:
        layers = self.layers(vm_id)
        return bool(layers) and layers[0].name.startswith("root")

    async def ensure_seed(self, vm_id: str, seed: Seed, *, opened: bool = False) -> Path:
        """Have the VM's seed CD say this. Written again only when it says something else. Raises Invalid.

        ``opened``: a process has the one that is there, and must see what it says now: it stays the same file. Raises
        Refused when that has no room. A kill in the middle leaves half of it, which the next call writes anew.
        """
        target = self.path(vm_id) / SEED
        check_seed(seed)
        mark = self.path(vm_id) / f"{SEED}.sha256"
        wanted = hashlib.sha256(repr(seed).encode()).hexdigest()
        if target.exists() and mark.exists() and mark.read_text() == wanted:
            return target
        content = await asyncio.to_thread(seed_iso, seed)
        content += bytes(-len(content) % SEED_BLOCK)
        mark.unlink(missing_ok=True)
        if opened:
            _rewrite(target, content)
        else:
            with self._replacing(target) as new:
                new.write_bytes(content)
                new.chmod(0o600)
        with self._replacing(mark) as new:
            new.write_text(wanted)
        return target

    async def used(self, vm_id: str) -> int:
        """Bytes that the VM's files take on this host's disk."""
        return await asyncio.to_thread(_used, self._root / vm_id)

    async def remove(self, vm_id: str) -> None:
        """Have none of the VM's files left."""
        assert _ID.fullmatch(vm_id), vm_id
        await asyncio.to_thread(_remove, self._root / vm_id)

    def inventory(self) -> list[str]:
        """Ids of the VMs that have a directory here."""
        return sorted(path.name for path in self._root.iterdir() if path.is_dir()) if self._root.is_dir() else []

    @contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        """A temporary name beside ``target`` that becomes it when the block ends well. Also clears what a kill left."""
        for left in target.parent.glob(f"{_TEMPORARY}{target.name}-*"):
            left.unlink(missing_ok=True)
        new = target.parent / f"{_TEMPORARY}{target.name}-{self._rt.random.token(4).hex()}"
        try:
            yield new
            descriptor = os.open(new, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            new.rename(target)
        except OSError as error:
            raise from_system(f"{target.name} of VM {target.parent.name} cannot be made", error) from error
        finally:
            new.unlink(missing_ok=True)


def _rewrite(target: Path, content: bytes) -> None:
    """Let an existing file say this, in all of its length."""
    with target.open("r+b") as file:
        room = file.seek(0, os.SEEK_END)
        if len(content) > room:
            raise Refused(
                f"the seed in {target} has no room for what it is to say", code="unsupported", field="template"
            )
        file.seek(0)
        file.write(content.ljust(room, b"\0"))
        file.flush()
        os.fsync(file.fileno())


def _number(layer: Path) -> int:
    match = _LAYER.fullmatch(layer.name)
    assert match is not None, layer
    return int(match[2] or 1)


def _used(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(Path(folder) / name).st_blocks * 512
            except FileNotFoundError:
                continue  # it went while we counted
    return total


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
