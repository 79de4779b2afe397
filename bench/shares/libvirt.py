"""The libvirt arm: the same kernel and program in guests of libvirt, weights set once with ``virsh schedinfo``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peers import libvirtd
from peers.libvirtd import Libvirtd

from shares.guests import build
from shares.measure import Guest

DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{cmdline} rdinit=/load -- busy</cmdline></os><cpu mode='custom'><model>qemu64</model></cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/>
<memballoon model='none'/><serial type='null'/></devices></domain>"""


def archive(path: Path, program: Path) -> None:
    """A cpio of the kernel's initramfs format (newc) with the program as /load."""

    def entry(name: str, mode: int, data: bytes) -> bytes:
        fields = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        return b"".join(part + bytes(-len(part) % 4) for part in (head, data))

    data = entry("load", 0o100755, program.read_bytes()) + entry("TRAILER!!!", 0, b"")
    path.write_bytes(data + bytes(-len(data) % 512))


class Libvirt:
    """Busy guests of a libvirtd. ``parts``: directory of the micro image, ``cmdline`` of its kernel."""

    def __init__(self, daemon: Libvirtd, parts: Path, cmdline: str) -> None:
        self._daemon, self._parts, self._cmdline = daemon, parts, cmdline
        where = daemon.where
        archive(where / "extra.cpio", build(where))
        (where / "initrd").write_bytes((where / "extra.cpio").read_bytes() + (parts / "initrd").read_bytes())

    def start(self, number: int, weight: float) -> Guest:
        """A busy guest with this weight; libvirt counts from 1024 for one of weight 1."""
        name, where = f"bench-{os.getpid()}-{number}", self._daemon.where
        text = DOMAIN.format(name=name, kernel=self._parts / "kernel", initrd=where / "initrd", cmdline=self._cmdline)
        (where / f"{name}.xml").write_text(text)
        self._daemon.virsh("create", str(where / f"{name}.xml"))
        self._daemon.virsh("schedinfo", name, "--live", f"cpu_shares={max(2, round(1024 * weight))}")
        return Guest(name, self._daemon.qemu(name))


@contextmanager
def running(parts: Path, cmdline: str) -> Iterator[Libvirt]:
    with libvirtd.running() as daemon:
        yield Libvirt(daemon, parts, cmdline)
