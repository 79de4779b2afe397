"""What a peer's guest is made of: the command line of a VM that Corral booted, read from its process.

:meth:`Pattern.qemu` starts exactly that by hand; :meth:`Pattern.domain` describes a guest of libvirt with the same
kernel, memory, disks and agent's port, and otherwise the devices that libvirt gives it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='KiB'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{cmdline}</cmdline></os><features><acpi/></features>
<cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model></cpu>
<devices><emulator>{emulator}</emulator><serial type='null'/><memballoon model='virtio'/>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>{disks}
<interface type='user'><model type='virtio'/></interface><channel type='unix'>
<source mode='bind' path='{agent}'/><target type='virtio' name='org.corral.guest.0'/></channel></devices></domain>"""
DISK = """<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>
<target dev='{target}' bus='virtio'/>{readonly}</disk>"""


@dataclass(frozen=True)
class Pattern:
    """``argv``: of its QEMU. ``root``: the file under its root disk's overlay, if it has a disk; ``seed``: its seed."""

    argv: tuple[str, ...]
    root: Path | None
    seed: Path | None

    def option(self, name: str) -> str:
        return self.argv[self.argv.index(name) + 1]

    def disks(self, where: Path) -> dict[str, Path]:
        """Fresh ones below ``where``, by name: an overlay over the image, a copy of the seed."""
        made = {}
        if self.root is not None:
            made["root"] = where / "root.qcow2"
            create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self.root)]
            subprocess.run([*create, str(made["root"])], check=True)
        if self.seed is not None:
            made["seed"] = Path(shutil.copy(self.seed, where / "seed.iso"))
        return made

    def qemu(self, where: Path, disks: dict[str, Path]) -> subprocess.Popen[bytes]:
        """Started by hand, running; its sockets are in ``where``, ``guest.sock`` is the agent's."""
        argv = []
        for part in self.argv:
            if part == "-S":
                continue
            if part.startswith("socket,"):
                part = re.sub(r"id=([a-z]+),fd=\d+", r"id=\1,path=\1.sock", part)
            elif part.startswith("{"):
                part = json.dumps(_own(json.loads(part), disks))
            argv.append(part)
        return subprocess.Popen(argv, cwd=where, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def domain(self, name: str, where: Path, disks: dict[str, Path]) -> str:
        """A domain for libvirt; ``guest.sock`` in ``where`` is its agent's."""
        rows = [
            DISK.format(format=form, path=disks[disk], target=target, readonly=readonly)
            for disk, form, target, readonly in (("root", "qcow2", "vda", ""), ("seed", "raw", "vdb", "<readonly/>"))
            if disk in disks
        ]
        return DOMAIN.format(
            name=name, memory=re.sub(r"size=(\d+)k", r"\1", self.option("-m")), kernel=self.option("-kernel"),
            initrd=self.option("-initrd"), cmdline=escape(self.option("-append")), emulator=self.argv[0],
            disks="".join(rows), agent=where / "guest.sock",
        )  # fmt: skip


def pattern_of(pid: int) -> Pattern:
    """Of a running VM of Corral's."""
    argv = [part.decode() for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    drives = {}
    for part in argv:
        if part.startswith("{") and "throttle-group" in (node := json.loads(part)) and "node-name" in node:
            drives[node["node-name"]] = node["file"]
    root, seed = drives.get("root"), drives.get("seed")
    return Pattern(
        tuple(argv), Path(root["backing"]["file"]["filename"]) if root else None,
        Path(seed["file"]["filename"]) if seed else None,
    )  # fmt: skip


def _own(part: dict[str, Any], disks: dict[str, Path]) -> dict[str, Any]:
    """A device's or disk's description with disks of one's own, and no port of the host."""
    part = {key: value for key, value in part.items() if key != "hostfwd"}
    if part.get("node-name") in disks:
        form = part["file"]
        file = {**form["file"], "filename": str(disks[part["node-name"]])}
        part["file"] = {**form, "file": file}
    return part
