"""What differs between guest architectures, as one table. Only x86_64 has been run so far; the others keep the door
open.
"""

from __future__ import annotations

from dataclasses import dataclass

from corral.errors import Refused


@dataclass(frozen=True)
class Arch:
    """One row: how QEMU makes a machine of this architecture."""

    binary: str
    machine: str
    """Machine type with the options that every VM gets."""
    cpu_emulated: str
    """Default CPU model under TCG."""
    vmgenid: bool
    """Has ACPI's VM generation id."""
    isa: bool
    """Serial port and pvpanic sit on an ISA bus (else: the board's own UART, pvpanic on PCI)."""
    firmware_targets: tuple[str, ...]
    """Prefixes of machine types in firmware descriptors (``pc-q35-*``) that stand for this machine."""


ARCHES: dict[str, Arch] = {
    # smm=off: only Secure Boot needs it, and it costs under TCG. sata=off: no driver for it in cloud kernels, and
    # firmware probes it. qemu64,+rdrand boots Debian fastest under TCG; the guest's crng is seeded by rdrand at once.
    "x86_64": Arch(
        binary="qemu-system-x86_64",
        machine="q35,smm=off,vmport=off,sata=off,smbus=off,dump-guest-core=off",
        cpu_emulated="qemu64,+rdrand",
        vmgenid=True,
        isa=True,
        firmware_targets=("pc-q35-",),
    ),
    "aarch64": Arch(
        binary="qemu-system-aarch64",
        machine="virt,gic-version=max,dump-guest-core=off",
        cpu_emulated="max",
        vmgenid=False,
        isa=False,
        firmware_targets=("virt",),
    ),
    "riscv64": Arch(
        binary="qemu-system-riscv64",
        machine="virt,dump-guest-core=off",
        cpu_emulated="rv64",
        vmgenid=False,
        isa=False,
        firmware_targets=("virt",),
    ),
}


def arch_of(name: str) -> Arch:
    """The row of an architecture; Refused ``unsupported`` when there is none."""
    if name not in ARCHES:
        raise Refused(f"there is no machine for architecture {name!r}", code="unsupported", field="arch")
    return ARCHES[name]
