"""A machine's directory ``vms/<id>/run`` and what is written there, so that any later daemon can take the machine
over.

``machine.json`` is written before QEMU is started (without a pid) and again as soon as the pid is known. ``lock`` is
a file lock that QEMU inherits: while it is held there *is* a process, whatever the record says, and a second one is
impossible. The directory belongs to the daemon, mode 0700: QEMU gets its sockets and its log as open descriptors and
can touch none of this.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec

from corral.engine.protocol import Drive, Exit, Machine

LAST_WORDS = 2048
MAX_LOG = 1 << 20
"""QEMU's stderr is cut down when it has grown beyond this: a guest can make QEMU complain without end."""
# ShutdownCause of QEMU's run-state.json, in its order, which is part of its trace output since 4.0.
_REASONS = (
    "none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui", "guest-shutdown",
    "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load",
)  # fmt: skip
_TRACED = re.compile(r"qemu_system_shutdown_request reason=(\d+)")
IN_GOOD_ORDER = {"guest-shutdown", "host-qmp-quit", "killed"}


class Freezing(msgspec.Struct, frozen=True, kw_only=True):
    """What its disks become once they are switched for ``template``."""

    template: str
    overlays: dict[str, Drive]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``machine.json``. ``pid``, ``start`` and ``boot_id`` name the process; no pid: it is about to be started."""

    version: int = 1
    machine: Machine
    boot_id: str
    accelerator: str
    uid: int | None = None
    pid: int | None = None
    start: int | None = None
    started_at: float | None = None
    """Wall time."""
    asked: bool = False
    """Its end was asked for (kill)."""
    fresh: bool = False
    """A fork whose CPUs have not run yet; QEMU calls it paused."""
    unplugged: bool = False
    """Its cables are out already: nothing is left to do for a fork but to let it run."""
    warm: bool = False
    """Made ahead, and nobody's: it becomes a VM's when this is written anew, and ends if nobody takes it."""
    freezing: Freezing | None = None
    """A template is being made of it. If nobody is at it any more, it may stand still in the middle of that."""
    tops: dict[str, str] = {}
    """Drive → the block node that is written to, where that is not the one it started with."""
    exit: Exit | None = None


def as_text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def as_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)


_ENCODER = msgspec.json.Encoder(enc_hook=as_text)
_DECODER = msgspec.json.Decoder(Record, dec_hook=as_path)


class RunDir:
    """The paths of one machine."""

    def __init__(self, root: Path, id: str) -> None:
        self.id = id
        self.vm = root / id
        """Shared with the storage room: disks lie here. Mode 0711."""
        self.path = self.vm / "run"
        self.record = self.path / "machine.json"
        self.lock = self.path / "lock"
        self.log = self.path / "stderr.log"
        self.variables = self.vm / "nvram.fd"
        """UEFI variables: they belong to the VM and survive its stops, like a disk."""

    def state(self, template: str) -> Path:
        """Where QEMU writes its devices' state while it is frozen for ``template``; there for a moment only."""
        return self.vm / f"frozen-{template}.state"

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def make(self) -> None:
        """Have the directories."""
        if not self.vm.exists():
            self.vm.mkdir(parents=True)
            self.vm.chmod(0o711)  # whatever the umask: the VM's user must get through to its disks
        self.path.mkdir(mode=0o700, exist_ok=True)

    def read(self) -> Record | None:
        """The record; None when there is none or it cannot be understood."""
        try:
            return _DECODER.decode(self.record.read_bytes())
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def write(self, record: Record) -> None:
        """Replace the record in one step."""
        fresh = self.path / "machine.json.new"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_ENCODER.encode(record))
        fresh.replace(self.record)

    def take_lock(self) -> int | None:
        """The lock as a descriptor that holds it (close it to let go); None while a process holds it.

        Raises FileNotFoundError when the directory is gone.
        """
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def has_process(self) -> bool:
        """Some process (launcher or QEMU) of this machine lives."""
        if not self.lock.exists():
            return False
        fd = self.take_lock()
        if fd is not None:
            os.close(fd)
        return fd is None

    def last_words(self) -> str:
        """The end of QEMU's stderr, without our own trace lines."""
        lines = [line for line in self._log_tail().splitlines() if not _TRACED.search(line)]
        return "\n".join(lines)[-LAST_WORDS:].strip()

    def shutdown_reason(self) -> str:
        """Why QEMU ended by itself, as it traced it; empty when it did not get to that."""
        found = _TRACED.findall(self._log_tail())
        return _REASONS[int(found[-1])] if found and int(found[-1]) < len(_REASONS) else ""

    def bound_log(self) -> None:
        """Empty the log if it has grown too long (QEMU appends, so it goes on from the start)."""
        try:
            if self.log.stat().st_size > MAX_LOG:
                os.truncate(self.log, 0)
        except FileNotFoundError:
            return

    def _log_tail(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * LAST_WORDS))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def remove(self) -> None:
        """Delete everything of the engine's; the VM's directory too when no disk is left in it."""
        if self.path.exists():
            shutil.rmtree(self.path)
        for left in self.vm.glob("frozen-*.state"):
            left.unlink(missing_ok=True)
        if self.vm.exists():
            rest = [entry.name for entry in self.vm.iterdir()]
            if rest == [self.variables.name]:
                self.variables.unlink()
                rest = []
            if not rest:
                self.vm.rmdir()


def ended(
    run: RunDir, record: Record, code: int | None, signal: int | None, *, known: bool, rebooted: bool = False
) -> Exit:
    """How the process ended. ``known``: code and signal are those of the process (it was our child)."""
    traced = run.shutdown_reason()
    if record.asked:
        reason = "killed"
    elif traced:
        reason = traced
    elif record.pid is None:
        reason = "never-started"
    elif rebooted:
        reason = "host-reboot"
    elif known and code == 0:
        reason = "exited"
    else:
        reason = "crashed" if known else "vanished"
    return Exit(asked=reason in IN_GOOD_ORDER, code=code, signal=signal, reason=reason, last_words=run.last_words())
