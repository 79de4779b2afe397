"""The templates of one host as the engine uses them: which there are, which fit a machine, what a fork starts from."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from corral.engine.protocol import Machine, Template
from corral.engine.qemu.command import Warm
from corral.engine.qemu.fork.shelf import Kept, Shelf
from corral.engine.qemu.hardware import digest
from corral.errors import CorralError, NotFound, Refused


class Templates:
    """Reads the shelf. ``accelerator`` is this host's, asked for when it is needed."""

    def __init__(self, shelf: Shelf, accelerator: Callable[[], Awaitable[str]]) -> None:
        self.shelf = shelf
        self._accelerator = accelerator

    async def hardware(self, machine: Machine) -> str:
        return await asyncio.to_thread(digest, machine, await self._accelerator())

    async def all(self) -> list[Template]:
        """Finished ones, as they are now."""
        accelerator = await self._accelerator()

        def look() -> list[Template]:
            loaded = self.shelf.keeper.ids()
            kept = [one for id in self.shelf.ids() if (one := self.shelf.read(id)) is not None]
            return [self._now(one, accelerator, one.template.id in loaded) for one in kept]

        return await asyncio.to_thread(look)

    async def find(self, id: str) -> Template | None:
        """One as it is now."""
        return next((one for one in await self.all() if one.id == id), None)

    def _now(self, kept: Kept, accelerator: str, loaded: bool) -> Template:
        template = kept.template
        stale = template.stale or self.shelf.missing(kept)
        if not stale:
            try:
                same = digest(template.machine, accelerator) == template.hardware
            except CorralError as error:
                stale = error.message
            else:
                stale = "" if same else "QEMU, the accelerator, this host's kernel or its CPU is another one"
        return msgspec.structs.replace(template, stale=stale, loaded=loaded)

    async def fitting(self, machine: Machine) -> Kept:
        """The template that ``machine`` is to be forked from. Raises what stands against it, field ``template``."""
        assert machine.template is not None
        accelerator = await self._accelerator()

        def look() -> Kept:
            kept = self.shelf.read(str(machine.template))
            if kept is None:
                raise NotFound(f"there is no template {machine.template} here", field="template")
            if stale := self._now(kept, accelerator, True).stale:
                raise Refused(f"template {machine.template} is stale: {stale}", code="stale", field="template")
            if digest(machine, accelerator) != kept.template.hardware:
                raise Refused(
                    f"template {machine.template} has other hardware", code="unsupported", field="template",
                    hint="CPUs, memory, devices and firmware of a fork are those of its template",
                )  # fmt: skip
            return kept

        return await asyncio.to_thread(look)

    def variables(self, kept: Kept) -> Path | None:
        """The firmware variables of a fork to be, if it has such."""
        path = self.shelf.place(kept.template.id) / "nvram.fd"
        return path if path.exists() else None

    @contextmanager
    def opened(self, kept: Kept) -> Iterator[Warm]:
        """Memory and devices as descriptors, for as long as the block runs. Blocks while the memory is loaded."""
        memory = self.shelf.memory(kept)
        try:
            state = os.open(self.shelf.place(kept.template.id) / "state", os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield Warm(memory=memory, state=state)
            finally:
                os.close(state)
        finally:
            os.close(memory)
