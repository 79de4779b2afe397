"""A libvirtd of a benchmark's own, in a mount namespace where its directories are empty: whatever libvirt this machine has
is left alone, and no systemd is needed. Needs the packages libvirt-daemon-system and libvirt-clients, and root;
:func:`missing` says what there is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRIVATE = ("/run/libvirt", "/var/lib/libvirt", "/etc/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
DAEMON = (
    'listen_tls = 0\nunix_sock_dir = "{where}"\nauth_unix_rw = "none"\nlog_outputs = "3:file:{where}/libvirtd.log"\n'
)
DRIVER = (
    'security_driver = "none"\nuser = "root"\ngroup = "root"\nremember_owner = 0\nnamespaces = []\n'
    'cgroup_controllers = [ "cpu", "cpuacct" ]\nstdio_handler = "file"\n'
)


def missing() -> str:
    """Why libvirt cannot be compared with here, and what to do; empty when it can."""
    if os.geteuid() != 0:
        return "libvirt's control groups need root"
    absent = [name for name in ("libvirtd", "virsh") if shutil.which(name) is None]
    return f"{', '.join(absent)}: apt-get install libvirt-daemon-system libvirt-clients" if absent else ""


class Libvirtd:
    """A running one. ``where``: a directory for whatever its guests are made of; ``pid``: its process."""

    def __init__(self, where: Path, pid: int) -> None:
        self.where, self.pid = where, pid

    def virsh(self, *arguments: str) -> str:
        uri = f"qemu+unix:///system?socket={self.where}/libvirt-sock"
        done = subprocess.run(
            ["virsh", "-q", "-c", uri, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def qemu(self, domain: str) -> int:
        """The pid of a running domain's QEMU."""
        return int((self.where / "run" / "qemu" / f"{domain}.pid").read_text())


@contextmanager
def running() -> Iterator[Libvirtd]:
    """One, gone afterwards with all its domains."""
    with tempfile.TemporaryDirectory(prefix="corral-libvirt-") as name:
        where = Path(name)
        where.chmod(0o711)
        (where / "libvirtd.conf").write_text(DAEMON.format(where=where))
        (where / "run").mkdir()
        script = [f"mkdir -p {path}; mount -t tmpfs none {path}" for path in PRIVATE[1:]]
        script += [f"mkdir -p {PRIVATE[0]}; mount --bind {where}/run {PRIVATE[0]}"]
        script += [
            f"printf '%s' '{DRIVER}' > /etc/libvirt/qemu.conf",
            f"exec libvirtd -f {where}/libvirtd.conf -p {where}/pid",
        ]
        daemon = subprocess.Popen(["unshare", "--mount", "sh", "-ec", "\n".join(script)], start_new_session=True)
        libvirtd = Libvirtd(where, daemon.pid)
        try:
            _wait(libvirtd, daemon)
            yield libvirtd
        finally:
            for domain in _domains(libvirtd):
                libvirtd.virsh("destroy", domain)
            daemon.terminate()
            daemon.wait(30)


def _domains(libvirtd: Libvirtd) -> list[str]:
    try:
        return libvirtd.virsh("list", "--name").split()
    except RuntimeError:
        return []


def _wait(libvirtd: Libvirtd, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            libvirtd.virsh("list")
            return
        except RuntimeError as error:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"libvirtd did not come up: {error}") from error
            time.sleep(0.3)
