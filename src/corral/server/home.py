"""The state directory: who owns it, what is in it, who this host is."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

import structlog

from corral.errors import CorralError, Refused
from corral.runtime import Random

log = structlog.get_logger("server")
KEYGEN_S = 20.0
"""ssh-keygen takes milliseconds; a machine without entropy takes a while."""


class Home(NamedTuple):
    """CORRAL_STATE and its parts."""

    state: Path
    cache: Path

    @property
    def vms(self) -> Path:
        return self.state / "vms"

    @property
    def images(self) -> Path:
        return self.state / "images"

    @property
    def keys(self) -> Path:
        return self.state / "keys"

    @property
    def store(self) -> Path:
        return self.state / "store.db"

    @property
    def socket(self) -> Path:
        return self.state / "api.sock"

    def make(self) -> None:
        """Have the directories. VM processes of other uids pass through, so they are 0711 and not 0700."""
        try:
            for path, mode in ((self.state, 0o711), (self.vms, 0o711), (self.images, 0o711), (self.keys, 0o700)):
                path.mkdir(mode=mode, parents=path is self.state, exist_ok=True)
                if path.stat().st_uid == os.geteuid():
                    path.chmod(mode)
            self.cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise CorralError(
                f"the state directory {self.state} cannot be made: {error.strerror}",
                hint="set CORRAL_STATE to another directory",
            ) from error


class Lock:
    """Possession of a state directory, until :meth:`release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            raise Refused(
                f"a daemon (pid {pid}) serves {path.parent} already", code="in-use",
                hint="`corral down` stops it; another CORRAL_STATE gives another daemon", pid=pid,
            ) from None  # fmt: skip
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let the next one in. The file stays: removing it would let two in."""
        os.ftruncate(self._file, 0)
        os.close(self._file)


def host_id(home: Home, random: Random) -> str:
    """Who this host is, for ever (of this state directory)."""
    path = home.state / "host-id"
    try:
        known = path.read_text().strip()
        if re.fullmatch(r"[0-9a-f-]{36}", known):
            return known
    except FileNotFoundError:
        pass
    made = random.id()
    new = path.with_suffix(".new")
    new.write_text(f"{made}\n")
    new.replace(path)
    return made


def host_name() -> str:
    """What VMs are placed by: the machine's name, as far as it is a DNS label."""
    label = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")[:63].rstrip("-")
    return label or "host"


def ssh_key(home: Home) -> str:
    """Corral's own public key, made once with ssh-keygen; empty (and said so) where there is no ssh-keygen."""
    private = home.keys / "id_ed25519"
    public = home.keys / "id_ed25519.pub"
    if not public.exists() or not private.exists():
        program = shutil.which("ssh-keygen")
        if program is None:
            log.warning("ssh-keygen is missing: `corral ssh` will not work", hint="install openssh-client")
            return ""
        for path in (private, public):
            path.unlink(missing_ok=True)
        command = [program, "-q", "-t", "ed25519", "-N", "", "-C", "corral", "-f", str(private)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=KEYGEN_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise CorralError(f"ssh-keygen failed: {error}", hint="`corral ssh` needs a key of Corral's own") from error
    return public.read_text().strip()
