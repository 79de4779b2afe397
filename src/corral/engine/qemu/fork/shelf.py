"""The directory of templates, ``CORRAL_STATE/templates/<id>``: records, files, memory.

``template.json`` is written last: what has none is unfinished. ``ram`` is a copy of the memory from which it is loaded
again after a reboot of the host, ``state`` the devices, ``nvram.fd`` the firmware's variables, and the disks are hard
links, so that they live as long as anybody needs them. The directory lets everybody through, its files nobody: QEMU
gets memory and devices as open descriptors, and the disks through a group of the template's own.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from corral.engine.protocol import Drive, Template
from corral.engine.qemu.fork import ram
from corral.engine.qemu.fork.keeper import Keeper
from corral.engine.qemu.record import as_path, as_text
from corral.errors import Refused
from corral.runtime.process import boot_id


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """``template.json``."""

    version: int = 1
    template: Template
    gid: int | None
    """The group that may read its disks; None where VMs have no users of their own."""


class Making(msgspec.Struct, frozen=True, kw_only=True):
    """``making.json``: whose template this is going to be, and what that machine's disks become."""

    machine: str
    boot_id: str
    overlays: dict[str, Drive]


_T = TypeVar("_T")
_ENCODER = msgspec.json.Encoder(enc_hook=as_text)
_KEPT = msgspec.json.Decoder(Kept, dec_hook=as_path)
_MAKING = msgspec.json.Decoder(Making, dec_hook=as_path)


class Shelf:
    """All templates of one host. Everything here blocks, for milliseconds unless it says otherwise."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keeper = Keeper(directory)
        self._loading = threading.Lock()

    def place(self, id: str) -> Path:
        return self.directory / id

    def ids(self) -> list[str]:
        """Finished and unfinished ones."""
        return sorted(path.name for path in self.directory.glob("*") if path.is_dir())

    def read(self, id: str) -> Kept | None:
        """A finished template; None when there is none (a record that cannot be understood is none)."""
        return _read(self.place(id) / "template.json", _KEPT)

    def making(self, id: str) -> Making | None:
        return _read(self.place(id) / "making.json", _MAKING)

    def gids(self) -> set[int]:
        """Groups that are taken."""
        return {kept.gid for id in self.ids() if (kept := self.read(id)) is not None and kept.gid is not None}

    # -- making one --------------------------------------------------------------------------------------------

    def begin(self, id: str, machine: str, overlays: dict[str, Drive]) -> None:
        """Have a place for a template of ``machine``, with nothing in it."""
        place = self.place(id)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o711, parents=True)
        for path in (place, self.directory):
            path.chmod(0o711)
        _write(place / "making.json", Making(machine=machine, boot_id=boot_id(), overlays=overlays))

    def link(self, id: str, overlays: Mapping[str, Drive], ours: Path) -> dict[Path, Path]:
        """Have links of the disks under ``overlays``: their name → the template's own name.

        What lies outside of the state directory ``ours`` (an image) is used where it is.
        """
        names: dict[Path, Path] = {}
        for name, overlay in overlays.items():
            for depth, layer in enumerate(overlay.layers):
                if layer.path.is_relative_to(ours) and layer.path not in names:
                    here = self.place(id) / f"{name}.{depth}.{layer.format}"
                    here.unlink(missing_ok=True)
                    here.hardlink_to(layer.path)
                    names[layer.path] = here
        return names

    def finish(self, kept: Kept) -> None:
        """From now on it is a template."""
        place = self.place(kept.template.id)
        _write(place / "template.json", kept)
        (place / "making.json").unlink(missing_ok=True)

    def spoil(self, kept: Kept, reason: str) -> None:
        """Nothing is forked from it any more."""
        stale = msgspec.structs.replace(kept.template, stale=reason)
        _write(self.place(kept.template.id) / "template.json", msgspec.structs.replace(kept, template=stale))

    def remove(self, id: str) -> None:
        """Have nothing left of it."""
        self.keeper.drop(id)
        place = self.place(id)
        (place / "template.json").unlink(missing_ok=True)  # first: half of a template is none
        shutil.rmtree(place, ignore_errors=True)

    def unload(self) -> None:
        """Have no memory of templates held: each is loaded from its copy on disk when it is used again."""
        for id in self.keeper.ids():
            self.keeper.drop(id)

    def sweep(self, alive: Callable[[str], bool]) -> None:
        """Remove what nobody can finish: the machine ended, or the host was booted since. ``alive`` tells by id."""
        for id in self.ids():
            if self.read(id) is None:
                making = self.making(id)
                if making is None or making.boot_id != boot_id() or not alive(making.machine):
                    self.remove(id)
        for id in self.keeper.ids() - set(self.ids()):
            self.keeper.drop(id)

    # -- using one ---------------------------------------------------------------------------------------------

    def missing(self, kept: Kept) -> str:
        """What is wrong with its files; empty when all is there."""
        template = kept.template
        for path, size in self._files(template):
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                return f"its file {path.name} is gone"
            if size is not None and found != size:
                return f"its file {path.name} has another size"
        return ""

    def _files(self, template: Template) -> Iterator[tuple[Path, int | None]]:
        place = self.place(template.id)
        yield place / "ram", template.machine.memory
        yield place / "state", None
        if template.machine.firmware == "uefi":
            yield place / "nvram.fd", None
        for drive in template.machine.drives:
            if not drive.readonly:
                for layer in drive.chain:
                    yield layer.path, None

    def memory(self, kept: Kept) -> int:
        """A descriptor of its memory. Loaded from disk, and checked, when nobody has it: a second per gigabyte.

        Raises Refused ``stale`` when the copy on disk is damaged.
        """
        with self._loading:  # many forks at once must not load it many times over
            fd = self.keeper.get(kept.template.id)
            return self._load(kept) if fd is None else fd

    def _load(self, kept: Kept) -> int:
        id = kept.template.id
        fd = ram.make(kept.template.machine.memory)
        try:
            source = os.open(self.place(id) / "ram", os.O_RDONLY | os.O_CLOEXEC)
            try:
                ram.copy(source, fd)
            finally:
                os.close(source)
            if ram.digest(fd) != kept.template.digest:
                self.spoil(kept, "its memory on disk is damaged")
                raise Refused(f"template {id} is stale: its memory on disk is damaged", code="stale", field="template")
            ram.seal(fd)
            self.keeper.put(id, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _read(path: Path, decoder: msgspec.json.Decoder[_T]) -> _T | None:
    try:
        return decoder.decode(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _write(path: Path, record: msgspec.Struct) -> None:
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(_ENCODER.encode(record))
    fresh.replace(path)
