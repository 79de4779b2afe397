"""Packages of the distribution this machine runs, from its own apt sources: looked up, downloaded, unpacked.

No root, nothing is installed. apt is pointed at directories of ours: a cache, and package lists
where the machine has none or stale ones.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from corral.errors import CorralError, Refused, Unavailable
from corral.runtime.program import run_program

_KERNELS = ("linux-image-cloud-{arch}", "linux-image-virtual", "linux-image-generic", "linux-image-{arch}")
"""Debian's kernel for virtual machines, Ubuntu's, and what is left."""
_DEB_ARCH = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}
_NO_EXTRAS = tuple(f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"))


class Kernel(NamedTuple):
    """The newest kernel there is: what to download, and a version that changes when it does."""

    packages: tuple[str, ...]
    version: str


class Distribution(NamedTuple):
    """What /etc/os-release says."""

    id: str
    codename: str

    @classmethod
    def here(cls, path: Path = Path("/etc/os-release")) -> Distribution:
        """The one that runs here; empty strings when it does not say."""
        text = path.read_text(errors="replace") if path.exists() else ""
        found = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', text, re.MULTILINE))
        return cls(found.get("ID", ""), found.get("VERSION_CODENAME", ""))


class Packages:
    """The machine's package sources. ``cache``: a directory of ours that keeps lists and downloads."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._lists = cache / "lists"

    def deb_arch(self, arch: str) -> str:
        """The distribution's word for ``arch``. Raises Refused when that is not this machine's."""
        if arch != platform.machine():
            raise Refused(
                f"images for {arch} cannot be built on {platform.machine()}",
                code="unsupported",
                hint="fetch one from the catalogue: corral image pull --help",
            )
        return _DEB_ARCH[arch]

    async def kernel(self, arch: str) -> Kernel:
        """The kernel package to build with. Fetches package lists when the machine has none."""
        for attempt in (1, 2):
            for template in _KERNELS:
                name = template.format(arch=self.deb_arch(arch))
                record = await self._show(name)
                needs = re.findall(r"\b(linux-(?:image|modules)-[0-9][^ ,]*)", record.get("Depends", ""))
                if needs:
                    modules = [
                        f"linux-modules-{need.removeprefix('linux-image-')}" for need in needs if "-image-" in need
                    ]
                    extra = [name for name in modules if await self._show(name)]  # Ubuntu ships them apart
                    return Kernel(tuple(dict.fromkeys((*needs, *extra))), record["Version"])
            if attempt == 1:
                await self.refresh()
        raise Unavailable(
            "apt knows no kernel package on this machine",
            hint="corral builds guests from the machine's own package sources: check /etc/apt and `apt-get update`",
        )

    async def refresh(self) -> None:
        """Fetch package lists into our cache; from now on they are used. A source that fails leaves the others."""
        (self._lists / "partial").mkdir(parents=True, exist_ok=True)
        argv = ["apt-get", *self._options(), "-q", "update"]
        await run_program(argv, what="fetching package lists", timeout_s=180, check=False)

    async def closure(self, names: Sequence[str], *, without: Iterable[str] = ()) -> list[str]:
        """``names`` and all they depend on."""
        argv = ["apt-cache", *self._options(), "depends", "--recurse", "-i", *_NO_EXTRAS, *names]
        output = (await run_program(argv, what="resolving packages", timeout_s=60)).stdout.decode()
        found = [line for line in output.splitlines() if re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", line)]
        skipped = set(without)
        return [name for name in dict.fromkeys(found) if name not in skipped]

    async def download(self, names: Sequence[str], directory: Path) -> list[Path]:
        """Have these packages as files, verified by apt. When lists are stale they are fetched once."""
        directory.mkdir(parents=True, exist_ok=True)
        argv = ["apt-get", *self._options(), "-q", "download", *names]
        try:
            await run_program(argv, what="downloading packages", timeout_s=600, cwd=directory)
        except CorralError:
            await self.refresh()
            argv = ["apt-get", *self._options(), "-q", "download", *names]
            await run_program(argv, what="downloading packages", timeout_s=600, cwd=directory)
        found = {path.name.split("_")[0]: path for path in sorted(directory.glob("*.deb"))}
        return [found[name] for name in names]

    async def sources(self, suite: str) -> list[str]:
        """The lines of sources.list that this machine has for a Debian release (main only); empty when it has none."""
        argv = ["apt-get", *self._options(), "indextargets", "--format", "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"]
        done = await run_program([*argv, "Created-By: Packages"], what="looking up sources", timeout_s=60, check=False)
        wanted = {f"{suite} main", f"{suite}-updates main", f"{suite}-security main"}
        lines = sorted({line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines()})
        return [line for line in lines if " ".join(line.split()[2:]) in wanted]

    async def unpack(self, packages: Iterable[Path], target: Path) -> None:
        """Unpack their files under ``target``, owned by whoever runs this."""
        for package in packages:
            await run_program(["dpkg-deb", "-x", package, target], what=f"unpacking {package.name}", timeout_s=120)

    async def _show(self, name: str) -> dict[str, str]:
        """The newest record of a package; empty when there is none."""
        argv = ["apt-cache", *self._options(), "show", "--no-all-versions", name]
        done = await run_program(argv, what="looking up packages", timeout_s=60, check=False)
        return dict(re.findall(r"^([A-Z][A-Za-z-]*): (.*)$", done.stdout.decode("utf-8", "replace"), re.MULTILINE))

    def _options(self) -> list[str]:
        (self._cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        options = {
            "Dir::Cache": self._cache,
            # Container images switch these off, which makes every lookup take a second.
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "Dir::Cache::srcpkgcache": "srcpkgcache.bin",
            "APT::Sandbox::User": "root",  # as root: the cache need not be open to user _apt
            "Acquire::Retries": 2,
        }
        if self._lists.is_dir():
            options["Dir::State::lists"] = self._lists
        return [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
