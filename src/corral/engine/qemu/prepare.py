"""From a machine to the start of its process: everything that can be refused before a process exists."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from corral.engine.protocol import Machine
from corral.engine.qemu import firmware
from corral.engine.qemu.arch import arch_of
from corral.engine.qemu.command import Surroundings, Warm, build
from corral.engine.qemu.launcher import DEVICES, Launch, Privileges, binary, device_groups, grant, template_groups
from corral.engine.qemu.record import RunDir

_KEEP_SIZE, _ZERO_RANGE = 0x01, 0x10


def prepare(
    machine: Machine, run: RunDir, *, uid: int | None, accelerator: str, privileges: Privileges,
    warm: Warm | None = None, variables: Path | None = None,
) -> Launch:  # fmt: skip
    """Give the VM's user its files, and say how the process is started.

    Args:
        warm: what a fork starts from. Its descriptors must stay open until the process is there.
        variables: the firmware variables that a new VM starts with (a fork's: its template's), None for fresh ones.
    """
    if uid is not None:
        grant(machine, run, uid)
    flash = firmware.of(machine)
    store = flash.variables if flash is not None else None
    if store is not None:
        if not run.variables.exists():
            fresh = run.path / "nvram.new"
            shutil.copyfile(variables or store, fresh)
            fresh.replace(run.variables)
        run.variables.chmod(0o600)
        if uid is not None:
            shutil.chown(run.variables, uid, uid)
    program = binary(arch_of(machine.arch).binary)
    devices = (*DEVICES, "/dev/kvm") if accelerator == "kvm" else DEVICES
    writable = {drive.path.parent for drive in machine.drives if not drive.readonly} | {run.vm}
    groups = template_groups(machine) if uid is not None else ()
    return Launch(
        run=run,
        arguments=lambda sockets: build(
            machine,
            Surroundings(accelerator, sockets, program, flash, run.variables if store else None, warm),
        ),
        uid=uid,
        namespaces=privileges.namespaces,
        writable=tuple(sorted(writable)),
        devices=devices,
        joins=machine.joins,
        groups=groups if privileges.namespaces else groups + device_groups(devices),
        inherited=() if warm is None else (warm.memory, warm.state),
        spare=warm is not None and zeroes_ranges(run.path),
    )


def zeroes_ranges(directory: Path) -> bool:
    """Whether the file system can write zeros without making a hole.

    Where it cannot, QEMU makes a hole instead, and must not hear that it is made when it is not: then a fork's balloon
    gives nothing back (the seal of its template's memory refuses), and its disks are right.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    path = directory / "zeroes"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        start, length = ctypes.c_long(0), ctypes.c_long(4096)
        if libc.fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, start, length) == 0:
            return True
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(path))
        return False
    finally:
        os.close(fd)
