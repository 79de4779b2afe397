"""The digest of a machine's hardware on this host: equal digests mean that one's state can be loaded into the other.

The virtual hardware is what QEMU is told, so QEMU's own arguments are hashed, with everything in them that a fork may
have of its own left out. State is a matter of QEMU's build too, and what a guest found out about its CPU is a matter
of the host's.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from corral.engine.hardware import common
from corral.engine.protocol import Machine
from corral.engine.qemu import firmware
from corral.engine.qemu.arch import arch_of
from corral.engine.qemu.command import SOCKETS, Surroundings, build
from corral.engine.qemu.launcher import binary


def digest(machine: Machine, accelerator: str) -> str:
    """64 hexadecimal digits. Raises what :func:`~corral.engine.qemu.command.build` raises."""
    program = binary(arch_of(machine.arch).binary)
    flash = firmware.of(machine)
    around = Surroundings(
        accelerator=accelerator, sockets=dict.fromkeys(SOCKETS, 0), binary=program, firmware=flash,
        variables=Path("/variables") if flash and flash.variables else None,
    )  # fmt: skip
    facts = [*build(common(machine), around), identity(Path(program)), *host_facts()]
    if flash is not None:
        facts.append(identity(flash.code))
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def identity(program: Path) -> str:
    """Which build of a file this is: a package's upgrade changes size and time."""
    facts = program.resolve().stat()
    return f"{program} {facts.st_size} {facts.st_mtime_ns}"


def host_facts() -> list[str]:
    """What a running guest may have found out about this host: its kernel and its CPU."""
    system = os.uname()
    cpu = [
        line
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if line.partition("\t")[0] in ("vendor_id", "model name", "flags", "Features", "isa", "CPU part")
    ]
    return [system.machine, system.release, system.version, *cpu]
