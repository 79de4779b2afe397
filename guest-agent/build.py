"""Builds Corral's two C programs as static musl binaries with zig's C compiler: corral-guest, the resident agent inside
VMs (beside this file), and corral-launch, which becomes QEMU (launcher/).

    python guest-agent/build.py [--all | --target x86_64 aarch64 riscv64] [--force]

Default: only this machine's architecture. A binary whose sources did not change is left alone: beside each stands a
stamp, the hash of everything that went into it. zig keeps its cache in $CORRAL_CACHE/zig (default .cache/zig); the
first build of a target compiles musl too and takes about a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "corral"


class Program(NamedTuple):
    """``sources``: where its C files are; ``out``: where the binaries go, one for each target."""

    name: str
    sources: Path
    out: Path


AGENT = Program("corral-guest", HERE / "src", PACKAGE / "guest" / "bin")
LAUNCHER = Program("corral-launch", HERE.parent / "launcher", PACKAGE / "engine" / "qemu" / "bin")
TARGETS = ("x86_64", "aarch64", "riscv64")
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-fno-sanitize=all")
BUILD_TIMEOUT_S = 600.0


def host_target() -> str:
    """This machine's architecture, in the names of :data:`TARGETS`."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())


def digest(program: Program, target: str) -> str:
    """The hash of all that decides about a program's binary for ``target``."""
    state = hashlib.sha256(repr((target, FLAGS)).encode())
    for path in sorted(program.sources.glob("*.[ch]")):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def build(program: Program, targets: Sequence[str] = (), *, force: bool = False) -> list[Path]:
    """Make the binaries that are missing or old; the paths of all asked for. Raises CalledProcessError."""
    program.out.mkdir(parents=True, exist_ok=True)
    return [_build_one(program, target, force=force) for target in targets or (host_target(),)]


def _build_one(program: Program, target: str, *, force: bool) -> Path:
    name, out, wanted = f"{program.name}-{target}", program.out, digest(program, target)
    binary, stamp = out / name, out / f".{name}.stamp"
    if not force and binary.exists() and stamp.exists() and stamp.read_text() == wanted:
        return binary
    cache = Path(os.environ.get("CORRAL_CACHE") or HERE.parent / ".cache") / "zig"
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    new = out / f".{name}.{os.getpid()}.new"  # two builds at once must not write one file
    sources = [str(path) for path in sorted(program.sources.glob("*.c"))]
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{target}-linux-musl"]
    try:
        subprocess.run(
            [*compiler, *FLAGS, "-o", str(new), *sources], check=True, env=environment, timeout=BUILD_TIMEOUT_S
        )
        new.chmod(0o755)
        new.replace(binary)
        stamp.write_text(wanted)
    finally:
        new.unlink(missing_ok=True)
    return binary


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the guest agent and the launcher.")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[])
    parser.add_argument("--all", action="store_true", help="every architecture")
    parser.add_argument("--force", action="store_true", help="even when nothing changed")
    options = parser.parse_args()
    for program in (AGENT, LAUNCHER):
        for path in build(program, TARGETS if options.all else options.target, force=options.force):
            print(path)  # noqa: T201 - a command


if __name__ == "__main__":
    main()
