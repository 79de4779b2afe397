"""Starting QEMU: whose rights it gets, which files it may touch, which sockets it listens on.

As root every VM has a numeric user of its own, own mount, pid, IPC and UTS namespaces, no capability; as a plain user
it stays that user, without new privileges. In both cases QEMU's seccomp sandbox is on and a QEMU without it does not
start. ``launcher/launch.c`` is the small program that does it between daemon and QEMU.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from corral.engine.protocol import Machine
from corral.engine.qemu.command import SOCKETS
from corral.engine.qemu.record import RunDir
from corral.errors import CorralError, Refused, Unavailable, Unknown
from corral.runtime.sockets import reachable

# systemd's table of uid ranges leaves 0x70000000 to 0x7FFDFFFF unused (above containers, below its foreign range).
FIRST_UID, UID_COUNT = 0x7000_0000, 0x0FFD_0000
_CAP_SYS_ADMIN = 21
_PROGRAMS = Path(__file__).with_name("bin")
DEVICES = ("/dev/null", "/dev/urandom")


@dataclass(frozen=True)
class Privileges:
    """What this daemon can do for the confinement of a VM."""

    separate_users: bool
    namespaces: bool

    def __str__(self) -> str:
        if self.namespaces:
            return "runs as root: every VM gets a user and namespaces of its own"
        if self.separate_users:
            return "runs as root: every VM gets a user of its own; namespaces cannot be made here (a chroot?)"
        return f"runs as user {os.geteuid()}: all VMs run as this user, in QEMU's own sandbox"

    @classmethod
    def here(cls) -> Privileges:
        """Root separates users; root that may also mount (not in every container, not in a chroot) namespaces too."""
        if os.geteuid() != 0:
            return cls(False, False)
        status = Path("/proc/self/status").read_text()
        effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
        # In a plain chroot "/" is no mount of its own, and what is not one cannot be made read-only for a VM.
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return cls(True, bool(effective >> _CAP_SYS_ADMIN & 1) and any(line.split()[4] == "/" for line in mounts))


def choose_uid(id: str, taken: Collection[int]) -> int:
    """A user for the VM ``id``: always the same one as long as nobody else has it."""
    start = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")
    for step in range(len(taken) + 1):
        uid = FIRST_UID + (start + step) % UID_COUNT
        if uid not in taken:
            return uid
    raise AssertionError("more users are taken than were counted")


def grant(machine: Machine, run: RunDir, uid: int) -> None:
    """Give the VM's user what it needs: its writable files and those beside them; others must be readable by all."""
    for drive in machine.drives:
        if not drive.readonly or drive.path.parent == run.vm:
            own(drive.path, uid)
        else:
            _readable(drive.path)
        for layer in drive.layers:
            _readable(layer.path, uid)
    if machine.kernel is not None:
        for path in filter(None, (machine.kernel.kernel, machine.kernel.initrd)):
            _readable(path)


def own(path: Path, uid: int) -> None:
    """Change the owner of a regular file, never of what a link points at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CorralError(f"{path} cannot be used as a disk: {error.strerror}", code="engine") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CorralError(f"{path} is not a regular file and cannot be used as a disk", code="engine")
        os.fchown(fd, uid, uid)
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)
    _passable(path)


def template_groups(machine: Machine) -> tuple[int, ...]:
    """The groups through which its VM may read the disks of templates that lie under its own."""
    groups = set()
    for path in (layer.path for drive in machine.drives for layer in drive.layers):
        facts = path.stat()
        if facts.st_gid >= FIRST_UID and facts.st_mode & (stat.S_IRGRP | stat.S_IROTH) == stat.S_IRGRP:
            groups.add(facts.st_gid)
    return tuple(sorted(groups))


def _readable(path: Path, uid: int | None = None) -> None:
    """Raise unless the VM can read it: as anybody, as its owner, or through a template's group."""
    try:
        facts = path.stat()
    except OSError as error:
        raise CorralError(f"{path} cannot be read: {error.strerror}", code="engine") from error
    its_own = uid is not None and facts.st_uid == uid
    of_a_template = facts.st_gid >= FIRST_UID and facts.st_mode & stat.S_IRGRP
    if not (facts.st_mode & stat.S_IROTH or its_own or of_a_template):
        raise CorralError(
            f"{path} is not readable by the VM's own user", code="engine", hint="images are files of mode 0444"
        )
    _passable(path)


def _passable(path: Path) -> None:
    for parent in path.resolve().parents:
        if not parent.stat().st_mode & stat.S_IXOTH:
            raise CorralError(
                f"{parent} cannot be entered by the VM's own user",
                code="engine",
                hint=f"VMs do not run as root: `chmod o+x {parent}`, or keep Corral's state elsewhere",
            )


def check_ports(machine: Machine) -> None:
    """Raise Refused ``in-use`` (or ``denied``) when a forwarded port cannot be had now.

    QEMU sets SO_REUSEADDR for UDP too, which would let two VMs have the same port; so that must be noticed here.
    """
    for card in machine.cards:
        for forward in card.forwards:
            kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
            with socket.socket(socket.AF_INET, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((forward.address, forward.host))
                    if kind == socket.SOCK_STREAM:
                        probe.listen(1)
                except PermissionError as error:
                    raise Refused(
                        f"port {forward.host} of {forward.address} is reserved for root",
                        code="denied",
                        field="ports",
                        hint="publish a port from 1024 on",
                    ) from error
                except OSError as error:
                    raise Refused(
                        f"port {forward.host} of {forward.address} cannot be used: {error.strerror}",
                        code="in-use",
                        field="ports",
                        hint="publish another port of the host",
                    ) from error


@dataclass(frozen=True)
class Launch:
    """One start. ``arguments`` makes QEMU's arguments from the descriptors of its sockets."""

    run: RunDir
    arguments: Callable[[dict[str, int]], list[str]]
    uid: int | None
    namespaces: bool
    writable: tuple[Path, ...] = ()
    devices: tuple[str, ...] = DEVICES
    groups: tuple[int, ...] = ()
    joins: tuple[Path, ...] = ()
    mortal: bool = False
    """The process dies with this one (a probe does; a VM must not)."""
    inherited: tuple[int, ...] = ()
    """Further descriptors that it gets, under the same numbers."""
    spare: bool = False
    """Punching holes into files succeeds and does nothing (see ``spare_files`` in launcher/launch.c)."""


def spawn(launch: Launch) -> int:
    """Start QEMU and return its pid. Blocks for some milliseconds: call it in a thread.

    The process gets the machine's lock; when somebody holds that already nothing is started (Unknown).
    """
    run = launch.run
    opened: list[int] = []
    try:
        lock = run.take_lock()
        if lock is None:
            raise Unknown(f"a process of machine {run.id} is there and cannot be identified")
        opened.append(lock)
        log = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        opened.append(log)
        sockets = {name: _listen(run.socket(name), opened) for name in SOCKETS}
        read, report = os.pipe()
        opened += [read, report]
        options = [*confinement(launch), f"report={report}"]
        process = subprocess.Popen(
            [str(program()), *options, "--", *launch.arguments(sockets)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=run.path,
            env={"LC_ALL": "C"},
            pass_fds=[lock, report, *sockets.values(), *launch.inherited],
            start_new_session=True,
        )
        opened.remove(report)
        os.close(report)
        told = _read_all(read)
        process.wait()  # the launcher itself ends as soon as QEMU's process is there
        if not told.strip().isdigit():
            raise CorralError(f"QEMU could not be started: {run.last_words()}", code="engine", hint=_hint(launch))
        return int(told)
    finally:
        for fd in opened:
            os.close(fd)


def program() -> Path:
    """corral-launch for this machine. Raises Unavailable when it is not built."""
    path = _PROGRAMS / f"corral-launch-{platform.machine()}"
    if not path.is_file():
        raise Unavailable(
            f"the launcher for {platform.machine()} has not been built",
            hint="run script/setup (or: python guest-agent/build.py)",
        )
    return path


def confinement(launch: Launch) -> list[str]:
    """The launch program's options for these rights."""
    options = [f"{name}=1" for name, wanted in (("mortal", launch.mortal), ("spare", launch.spare)) if wanted]
    options += [f"join={path}" for path in launch.joins]
    if launch.uid is not None:
        options += [f"uid={launch.uid}", f"groups={','.join(str(group) for group in launch.groups)}"]
    if launch.namespaces:
        assert launch.uid is not None, "a namespace of its own without a user of its own confines nothing"
        options.append("namespaces=1")
        options += [f"writable={path}" for path in launch.writable]
        options += [f"device={path}" for path in launch.devices if Path(path).exists()]
    return options


def device_groups(devices: Iterable[str]) -> tuple[int, ...]:
    """The groups whose members may use these devices (``kvm``)."""
    found = {Path(device).stat() for device in devices if Path(device).exists()}
    return tuple(sorted({facts.st_gid for facts in found if facts.st_gid and facts.st_mode & 0o060 == 0o060}))


def binary(name: str) -> str:
    """Where QEMU is. Raises Refused ``unsupported``."""
    path = shutil.which(name)
    if path is None:
        raise Refused(f"{name} is not installed here", code="unsupported", hint="install QEMU (qemu-system-x86)")
    return path


def _hint(launch: Launch) -> str:
    if launch.namespaces:
        return "root may not make namespaces here (a container?): run Corral as a plain user"
    return ""


def _listen(path: Path, opened: list[int]) -> int:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, reachable(path) as address:
        listener.bind(address)
        listener.listen(1)
        path.chmod(0o600)
        opened.append(listener.detach())
    return opened[-1]


def _read_all(fd: int) -> str:
    pieces = []
    while piece := os.read(fd, 64):
        pieces.append(piece)
    return b"".join(pieces).decode(errors="replace")
