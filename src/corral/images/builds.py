"""Builds: which recipes there are, and a cache so that the same ingredients are never built twice on one machine.

The cache (CORRAL_CACHE) may be shared by many state directories and daemons: finished builds stand under their recipe
digest, one build at a time runs per digest (a lock file), and everyone else waits for it and takes the result.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

from corral.errors import CorralError, NotFound, Refused, Unavailable
from corral.images import debian, micro
from corral.images.convert import Converter
from corral.images.files import Manifest, Progress
from corral.images.packages import Distribution, Packages
from corral.images.recipe import INSIDE, Ingredients
from corral.images.shelf import Shelf, seal
from corral.runtime import Runtime, deadline

Recipe: TypeAlias = Callable[[Ingredients, Path], Awaitable[Manifest]]

RECIPES: dict[str, Recipe] = {"micro": micro.build, "debian": debian.build}
BUILD_TIMEOUT_S = 1800.0
"""A slow mirror and two slow cores still fit."""
_SOURCES = ("recipe", "micro", "debian", "kernel", "tree", "guest_files")
"""Modules whose text decides what comes out."""


class Builds:
    """Builds images by recipe. ``agent_binaries``: directory of ``corral-guest-<arch>`` files."""

    def __init__(self, cache: Path, agent_binaries: Path, converter: Converter, rt: Runtime) -> None:
        self._cache, self._agents, self._rt = cache, agent_binaries, rt
        self._converter = converter
        self._packages = Packages(cache / "apt")
        self._known: dict[tuple[str, str], str] = {}
        self.shelf = Shelf(cache / "images", rt.random)

    async def build(self, recipe: str, arch: str, progress: Progress) -> Path:
        """Have the image built: its finished directory in the cache. Raises Refused for an unknown recipe or arch."""
        if recipe not in RECIPES:
            raise Refused(f"there is no recipe {recipe!r}", code="unsupported", hint=f"recipes: {', '.join(RECIPES)}")
        self._packages.deb_arch(arch)  # refuses other machines' architectures
        agent = self._agents / f"corral-guest-{arch}"
        if not agent.is_file():
            raise Unavailable(f"the guest agent for {arch} is not built", hint="run script/setup")
        async with deadline(BUILD_TIMEOUT_S, f"building the image {recipe}"):
            self.shelf.root.mkdir(mode=0o755, parents=True, exist_ok=True)
            progress("looking up packages", 0, 0)
            kernel = await self._packages.kernel(arch)
            suite = debian.suite(Distribution.here())
            name = _digest(recipe, arch, suite, kernel.version, agent)
            async with self._alone(name):
                try:
                    self.shelf.read(name)
                except NotFound:
                    self.shelf.remove(name)
                    with (
                        tempfile.TemporaryDirectory(prefix="corral-build-", dir="/var/tmp") as text,
                        self.shelf.staging() as staging,
                    ):
                        parts = Ingredients(
                            arch, suite, kernel, agent, self._packages, self._converter, Path(text), INSIDE, progress
                        )
                        manifest = await RECIPES[recipe](parts, staging)
                        progress("measuring the image", 0, 0)
                        await asyncio.to_thread(seal, staging, manifest)
                        self.shelf.put(staging, name)
        return self.shelf.root / name

    def digest(self, recipe: str, arch: str) -> str:
        """What a build of today would be made of, but for packages; empty: it cannot be built here."""
        if (recipe, arch) not in self._known:
            agent = self._agents / f"corral-guest-{arch}"
            try:
                suite = debian.suite(Distribution.here())
            except CorralError:
                suite = ""
            able = recipe in RECIPES and suite and agent.is_file()
            self._known[recipe, arch] = _digest(recipe, arch, suite, "", agent) if able else ""
        return self._known[recipe, arch]

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of one build. It goes with the process, so a killed builder blocks nobody."""
        descriptor = os.open(self.shelf.root / f".lock-{name[:32]}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await self._rt.clock.sleep(0.2)
            yield
        finally:
            os.close(descriptor)


def _digest(recipe: str, arch: str, suite: str, kernel: str, agent: Path) -> str:
    """The name of a build: whatever changes the result changes it."""
    here = Path(__file__).parent
    files = [*(here / f"{name}.py" for name in _SOURCES), *sorted(INSIDE.iterdir()), agent]
    total = hashlib.sha256("\0".join((recipe, arch, suite, kernel)).encode())
    for path in files:
        if path.is_file():
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
