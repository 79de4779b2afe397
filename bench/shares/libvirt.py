"""The libvirt arm: the same kernel and program in guests of libvirt, weights set once with ``virsh schedinfo``.

A libvirtd of its own, in a mount namespace where its directories are empty: whatever libvirt this machine has is left
alone. Needs the packages libvirt-daemon-system and libvirt-clients, root, and control groups that libvirt can write;
:func:`missing` says what there is not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shares.guests import build
from shares.measure import Guest

PRIVATE = ("/run/libvirt", "/var/lib/libvirt", "/etc/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
DAEMON = (
    'listen_tls = 0\nunix_sock_dir = "{where}"\nauth_unix_rw = "none"\nlog_outputs = "3:file:{where}/libvirtd.log"\n'
)
DRIVER = (
    'security_driver = "none"\nuser = "root"\ngroup = "root"\nremember_owner = 0\nnamespaces = []\n'
    'cgroup_controllers = [ "cpu", "cpuacct" ]\nstdio_handler = "file"\n'
)
DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{cmdline} rdinit=/load -- busy</cmdline></os><cpu mode='custom'><model>qemu64</model></cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/>
<memballoon model='none'/><serial type='null'/></devices></domain>"""


def missing() -> str:
    """Why libvirt cannot be compared with here; empty when it can."""
    if os.geteuid() != 0:
        return "libvirt's control groups need root"
    absent = [name for name in ("libvirtd", "virsh") if shutil.which(name) is None]
    return f"{', '.join(absent)}: apt-get install libvirt-daemon-system libvirt-clients" if absent else ""


def archive(path: Path, program: Path) -> None:
    """A cpio of the kernel's initramfs format (newc) with the program as /load."""

    def entry(name: str, mode: int, data: bytes) -> bytes:
        fields = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        return b"".join(part + bytes(-len(part) % 4) for part in (head, data))

    data = entry("load", 0o100755, program.read_bytes()) + entry("TRAILER!!!", 0, b"")
    path.write_bytes(data + bytes(-len(data) % 512))


class Libvirt:
    """A running libvirtd. ``parts``: directory of the micro image, ``cmdline`` of its kernel."""

    def __init__(self, where: Path, parts: Path, cmdline: str) -> None:
        self.where, self._parts, self._cmdline = where, parts, cmdline

    def virsh(self, *arguments: str) -> str:
        uri = f"qemu+unix:///system?socket={self.where}/libvirt-sock"
        done = subprocess.run(
            ["virsh", "-q", "-c", uri, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def start(self, number: int, weight: float) -> Guest:
        """A busy guest with this weight; libvirt counts from 1024 for one of weight 1."""
        name = f"bench-{os.getpid()}-{number}"
        text = DOMAIN.format(
            name=name, kernel=self._parts / "kernel", initrd=self.where / "initrd", cmdline=self._cmdline
        )
        (self.where / f"{name}.xml").write_text(text)
        self.virsh("create", str(self.where / f"{name}.xml"))
        self.virsh("schedinfo", name, "--live", f"cpu_shares={max(2, round(1024 * weight))}")
        pid = (self.where / "run" / "qemu" / f"{name}.pid").read_text()
        return Guest(name, int(pid))

    def schedinfo(self, guest: Guest) -> int:
        """The weight as libvirt reads it back."""
        found = re.search(r"cpu_shares\s*:\s*(\d+)", self.virsh("schedinfo", guest.name))
        return int(found[1]) if found else 0


@contextmanager
def running(parts: Path, cmdline: str) -> Iterator[Libvirt]:
    with tempfile.TemporaryDirectory(prefix="corral-libvirt-") as name:
        where = Path(name)
        where.chmod(0o711)
        (where / "libvirtd.conf").write_text(DAEMON.format(where=where))
        (where / "run").mkdir()
        archive(where / "extra.cpio", build(where))
        (where / "initrd").write_bytes((where / "extra.cpio").read_bytes() + (parts / "initrd").read_bytes())
        script = [f"mkdir -p {path}; mount -t tmpfs none {path}" for path in PRIVATE[1:]]
        script += [f"mkdir -p {PRIVATE[0]}; mount --bind {where}/run {PRIVATE[0]}"]
        script += [
            f"printf '%s' '{DRIVER}' > /etc/libvirt/qemu.conf",
            f"exec libvirtd -f {where}/libvirtd.conf -p {where}/pid",
        ]
        daemon = subprocess.Popen(["unshare", "--mount", "sh", "-ec", "\n".join(script)], start_new_session=True)
        libvirt = Libvirt(where, parts, cmdline)
        try:
            _wait(libvirt, daemon)
            yield libvirt
        finally:
            for domain in _domains(libvirt):
                libvirt.virsh("destroy", domain)
            daemon.terminate()
            daemon.wait(30)


def _domains(libvirt: Libvirt) -> list[str]:
    try:
        return libvirt.virsh("list", "--name").split()
    except RuntimeError:
        return []


def _wait(libvirt: Libvirt, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            libvirt.virsh("list")
            return
        except RuntimeError as error:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"libvirtd did not come up: {error}") from error
            time.sleep(0.3)
