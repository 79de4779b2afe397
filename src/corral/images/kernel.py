"""A distribution's kernel package, made ready for direct boot: uncompressed ELF (PVH) and modules in load order.

QEMU starts an uncompressed vmlinux by its PVH note without firmware or decompression in the guest, which under software
emulation is worth 0.3 s. The bzImage layout is that of the kernel's Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

from corral.errors import CorralError, Unavailable
from corral.runtime.program import run_program

_ELF = b"\x7fELF"
_COMMANDS = {
    b"\x02\x21\x4c\x18": ("lz4", "lz4"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd"),
}
"""First bytes of a payload → program that unpacks it, and its package."""


async def extract_vmlinux(image: Path, target: Path) -> None:
    """Write the uncompressed, stripped kernel of a bzImage (or of a plain ELF or gzip image) to ``target``."""
    data = image.read_bytes()
    payload = _payload(data)
    if payload.startswith(_ELF):
        target.write_bytes(payload)
    else:
        await _decompress(payload, target)
        with target.open("rb") as file:
            if file.read(4) != _ELF:
                raise CorralError(f"the kernel in {image.name} is not an ELF file after unpacking")
    if shutil.which("strip"):  # saves disk and page cache, nothing else: not worth a hard dependency
        await run_program(["strip", target], what="stripping the kernel", timeout_s=60)


def _payload(data: bytes) -> bytes:
    """The compressed kernel inside a bzImage; ``data`` itself when it is none."""
    if data[0x202:0x206] != b"HdrS":
        return data
    setup_sectors = data[0x1F1] or 4
    offset, length = (int.from_bytes(data[at : at + 4], "little") for at in (0x248, 0x24C))
    start = (setup_sectors + 1) * 512 + offset
    if int.from_bytes(data[0x206:0x208], "little") < 0x208 or not length or start + length > len(data):
        raise CorralError("the kernel image has no payload that its header describes")
    return data[start : start + length]


async def _decompress(payload: bytes, target: Path) -> None:
    if payload.startswith(b"\xfd7zXZ"):
        target.write_bytes(lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload))
    elif payload.startswith(b"\x1f\x8b"):
        target.write_bytes(zlib.decompressobj(31).decompress(payload))
    elif payload[:4] in _COMMANDS:
        program, package = _COMMANDS[payload[:4]]
        if shutil.which(program) is None:
            raise Unavailable(
                f"the kernel is packed with {program}, which is not installed", hint=f"apt install {package}"
            )
        packed = target.with_suffix(".packed")
        packed.write_bytes(payload[:-4])  # the kernel's build appends the unpacked size
        output: list[str | Path] = ["-o", target] if program == "zstd" else [target]
        await run_program([program, "-d", "-f", "-q", packed, *output], what="unpacking the kernel", timeout_s=60)
        packed.unlink()
    else:
        raise CorralError(f"the kernel is packed in an unknown way (it begins with {payload[:4].hex()})")


class Modules:
    """The loadable modules of one kernel: found by name, read uncompressed, ordered by what they depend on."""

    def __init__(self, root: Path) -> None:
        """``root``: the package's ``lib/modules/<release>``."""
        self.root, self.release = root, root.name
        self._paths = {_name(path.name): path for path in root.rglob("*.ko*")}

    @classmethod
    async def open(cls, root: Path) -> Modules:
        """Those of the one kernel that is unpacked under ``root``."""
        found = [path for path in (*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")) if path.is_dir()]
        if len(found) != 1:
            raise CorralError(f"the kernel packages hold {len(found)} module trees instead of one")
        packed = sorted(found[0].rglob("*.ko.zst"))  # Ubuntu's; Python has no zstd before 3.14
        if packed:
            await run_program(["zstd", "-d", "-q", "--rm", *packed], what="unpacking kernel modules", timeout_s=120)
        return cls(found[0])

    def read(self, name: str) -> bytes:
        """The module as the kernel takes it (Debian 13 ships .ko.xz, Ubuntu .ko.zst)."""
        path = self._paths[_name(name)]
        raw = path.read_bytes()
        match path.suffix:
            case ".xz":
                return lzma.decompress(raw)
            case ".gz":
                return gzip.decompress(raw)
            case ".ko":
                return raw
        raise CorralError(f"{path.name}: modules packed this way are not supported")

    def order(self, wanted: Iterable[str]) -> list[str]:
        """``wanted`` and all they need, each after its needs; what this kernel has built in (or lacks) is left out."""
        done: list[str] = []

        def visit(name: str) -> None:
            if name in done or name not in self._paths:
                return
            for need in self._needs(name):
                visit(need)
            done.append(name)

        for name in wanted:
            visit(_name(name))
        return done

    def _needs(self, name: str) -> list[str]:
        """The ``depends=`` of a module's .modinfo section: what modules.dep is made from."""
        found = re.search(rb"\0depends=([^\0]*)\0", self.read(name))
        return [_name(need) for need in found[1].decode().split(",") if need] if found else []


def _name(text: str) -> str:
    """The kernel's own spelling of a module's name."""
    return text.split(".ko")[0].replace("-", "_")
