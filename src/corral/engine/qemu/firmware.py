"""Where firmware lies. UEFI: the distribution's descriptors (/usr/share/qemu/firmware), else a table of known places.

The BIOS is QEMU's SeaBIOS, but put in as flash: the ROM that QEMU makes of it by itself stays empty in a process that
loads a saved state, so that a fork's reset ended in nothing (its memory is expected to come with the state).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from corral.engine.protocol import Machine
from corral.engine.qemu.arch import arch_of
from corral.errors import Refused

DESCRIPTORS = Path("/usr/share/qemu/firmware")
_KNOWN: dict[str, tuple[tuple[str, str], ...]] = {
    # code and variable store must be of one family (4M with 4M)
    "x86_64": (
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ),
    "aarch64": (("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),),
    "riscv64": (),
}
_BIOS = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/local/share/qemu/bios-256k.bin")
# Needs SMM (and silently hangs without) or keys that we do not manage.
_UNWANTED = {"requires-smm", "enrolled-keys", "secure-boot", "amd-sev-es", "amd-sev-snp", "intel-tdx"}


@dataclass(frozen=True)
class Firmware:
    """Code, shared by all VMs, and with UEFI the template of the variables of which each VM gets a copy."""

    code: Path
    variables: Path | None
    format: str = "raw"


def of(machine: Machine) -> Firmware | None:
    """What a machine gets as flash; None where QEMU's own for its board will do. Raises Refused as :func:`find`."""
    if machine.firmware == "uefi":
        return find(machine.arch)
    if machine.arch != "x86_64":
        return None
    for path in _BIOS:
        if Path(path).exists():
            return Firmware(Path(path), None)
    raise Refused(
        f"SeaBIOS is not installed here (looked for {', '.join(_BIOS)})",
        code="unsupported",
        hint="install the package seabios",
    )


def find(arch: str, descriptors: Path = DESCRIPTORS) -> Firmware:
    """UEFI without Secure Boot for ``arch``. Raises Refused ``unsupported`` when none is installed."""
    targets = arch_of(arch).firmware_targets
    for path in sorted(descriptors.glob("*.json")):
        found = _read(path, arch, targets)
        if found is not None and found.code.exists() and found.variables and found.variables.exists():
            return found
    for code, variables in _KNOWN.get(arch, ()):
        if Path(code).exists() and Path(variables).exists():
            return Firmware(Path(code), Path(variables))
    raise Refused(
        f"no UEFI firmware for {arch} is installed here",
        code="unsupported",
        hint="install the package ovmf (x86_64) or qemu-efi-aarch64, or use BIOS",
    )


def _read(path: Path, arch: str, targets: tuple[str, ...]) -> Firmware | None:
    """The firmware of one descriptor if it is one for us; None otherwise (other vendors' files may hold anything)."""
    try:
        data: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict)
        mapping = data["mapping"]
        fits = any(
            target["architecture"] == arch and any(m.startswith(targets) for m in target["machines"])
            for target in data["targets"]
        )
        plain = "uefi" in data["interface-types"] and not _UNWANTED & set(data["features"])
        if not fits or not plain or mapping["device"] != "flash" or mapping.get("mode", "split") != "split":
            return None
        code, variables = mapping["executable"], mapping["nvram-template"]
        if code["format"] not in ("raw", "qcow2") or variables["format"] != "raw":
            return None
        return Firmware(Path(code["filename"]), Path(variables["filename"]), code["format"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return None
