"""The images of this host: how they come (build, fetch, upload), where they stand, how they go.

    source → (download | upload, in private directories) → header check → conversion to our own qcow2 → shelf

Everything is done again from where it was when the process was killed: downloads go on, builds come from the cache, and
what is on the shelf is whole. This file joins; each step has its own neighbour.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from corral.errors import Refused
from corral.images import catalogue
from corral.images.builds import Builds
from corral.images.convert import Converter, copy_private, take_disk
from corral.images.fetch import Checksum, Fetcher
from corral.images.files import Boot, ImageFiles, Manifest, Progress
from corral.images.header import MAX_VIRTUAL_SIZE
from corral.images.shelf import Shelf, seal
from corral.model import ImageSpec
from corral.runtime import Runtime
from corral.units import MIB, format_size

_UPLOAD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


class ImageStore:
    """Images under ``root`` (CORRAL_STATE/images), builds shared under ``cache`` (CORRAL_CACHE).

    Args:
        converter: turns accepted files into qcow2.
        agent_binaries: directory with ``corral-guest-<arch>``, which builds put into guests.
        allow_loopback: let downloads come from this machine, also by http (tests, a local mirror).
    """

    def __init__(
        self,
        root: Path,
        cache: Path,
        rt: Runtime,
        *,
        converter: Converter,
        agent_binaries: Path,
        allow_loopback: bool | None = None,
        max_virtual_size: int = MAX_VIRTUAL_SIZE,
    ) -> None:
        if allow_loopback is None:
            allow_loopback = os.environ.get("CORRAL_FETCH_LOOPBACK") == "1"
        self._shelf = Shelf(root, rt.random)
        self._builds = Builds(cache, agent_binaries, converter, rt)
        self._fetcher = Fetcher(root / ".downloads", rt, allow_loopback=allow_loopback)
        self._uploads = root / ".uploads"
        self._converter, self._max_virtual_size, self._rt = converter, max_virtual_size, rt

    def files(self, digest: str) -> ImageFiles:
        """A finished image. Raises NotFound."""
        return ImageFiles.at(self._shelf.root / digest, digest, self._shelf.read(digest))

    def inventory(self) -> list[str]:
        """Digests of all finished images here."""
        return self._shelf.names()

    async def remove(self, digest: str) -> None:
        """Have no such image. The caller knows that nothing uses it."""
        await asyncio.to_thread(self._shelf.remove, digest)

    def sweep(self) -> None:
        """Remove what a killed process left half-made. Call once, before anything else runs on this directory."""
        self._shelf.sweep()
        shutil.rmtree(self._uploads, ignore_errors=True)

    def recipe(self, recipe: str, arch: str) -> str:
        """A digest of the recipe and of the corral-guest that a build of today would have; empty: none can be built."""
        return self._builds.digest(recipe, arch)

    async def build(self, recipe: str, arch: str, progress: Progress) -> ImageFiles:
        """Have the image of a recipe (``micro``, ``debian``). Raises Refused, Unavailable, TimedOut."""
        built = await self._builds.build(recipe, arch, progress)
        digest = self._builds.shelf.read(built.name).digest
        if digest not in self.inventory():
            await asyncio.to_thread(self._shelf.copy, built, digest)
        return self.files(digest)

    async def fetch(self, spec: ImageSpec, progress: Progress) -> ImageFiles:
        """Have an image from the catalogue or a URL: download (resumed), verify, check, convert.

        ``spec.url`` of a catalogue entry is a mirror of it, verified against the distribution's checksum list unless
        ``spec.checksum`` is given. Raises Refused, Unavailable.
        """
        if spec.source == "catalogue":
            listed = catalogue.find(spec.recipe, spec.arch)
            checksum = spec.checksum
            if not checksum:
                progress("fetching the checksum list", 0, 0)
                names = await self._fetcher.text(listed.checksums)
                checksum = catalogue.checksum_in(names, listed.url.rpartition("/")[2], listed.kind)
            wanted = Manifest(
                name=listed.name,
                arch=listed.arch,
                boot="disk",
                firmware=listed.firmware,
                min_memory=listed.min_memory_mib * MIB,
                default_user=listed.user,
            )
            url, declared = spec.url or listed.url, str(listed.format)
        else:
            checksum, url, declared = spec.checksum, spec.url, spec.format
            wanted = _described(spec)
        part = await self._fetcher.fetch(url, Checksum.parse(checksum) if checksum else None, progress)
        try:
            files = await self._take(part, declared, wanted, progress)
        except Refused:
            self._fetcher.forget(part)
            raise
        self._fetcher.forget(part)
        return files

    async def receive(self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int) -> Path:
        """Store an upload, at most ``limit`` bytes; returns its path when it is durable. An earlier one is replaced."""
        if not _UPLOAD_ID.fullmatch(upload_id):
            raise Refused(f"{upload_id[:80]!a} is not an upload's id", code="invalid")
        self._uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self._uploads / upload_id
        new = self._uploads / f".{upload_id}-{self._rt.random.token(4).hex()}"
        try:
            with new.open("xb") as file:
                total = 0
                async for chunk in chunks:
                    total += len(chunk)
                    if total > limit:
                        raise Refused(f"the upload is larger than {format_size(limit)}", code="too-large")
                    await asyncio.to_thread(file.write, chunk)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            new.rename(target)
        finally:
            new.unlink(missing_ok=True)
        return target

    async def accept(self, path: Path, spec: ImageSpec, progress: Progress) -> ImageFiles:
        """Make an image of a received file; an upload is removed, whatever comes of it. Raises ``bad-image``."""
        try:
            if spec.checksum:
                progress("checking the checksum", 0, 0)
                if not await asyncio.to_thread(Checksum.parse(spec.checksum).matches, path):
                    raise Refused("the file does not have the stated checksum", code="bad-image", field="spec.checksum")
            return await self._take(path, spec.format, _described(spec), progress)
        finally:
            if path.parent == self._uploads:
                path.unlink(missing_ok=True)

    async def _take(self, path: Path, declared: str, wanted: Manifest, progress: Progress) -> ImageFiles:
        """Header check, conversion, shelf."""
        with self._shelf.staging() as staging:
            source = path
            if path.parent not in (self._uploads, self._shelf.root / ".downloads"):  # those are 0700 and ours
                source = staging / ".source"
                await asyncio.to_thread(copy_private, path, source)
            limit = self._max_virtual_size
            header = await take_disk(source, declared, staging, self._converter, limit=limit, progress=progress)
            if source != path:
                source.unlink()
            boot: Boot = "cdrom" if header.format == "iso" else wanted.boot
            wanted = msgspec.structs.replace(wanted, boot=boot, virtual_size=header.virtual_size)
            progress("measuring the image", 0, 0)
            manifest = await asyncio.to_thread(seal, staging, wanted)
            self._shelf.put(staging, manifest.digest)
        return self.files(manifest.digest)


def _described(spec: ImageSpec) -> Manifest:
    """What a user says of an image of their own."""
    return Manifest(name=spec.description[:80] or "image", arch=spec.arch, boot="disk", firmware=spec.firmware)
