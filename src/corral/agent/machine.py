"""From a record and an image's files to the virtual hardware the engine is asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from corral.agent.ports import BootFiles
from corral.engine.protocol import Card, Drive, HostForward, KernelBoot, Layer, Limits, Machine
from corral.errors import Bug
from corral.model import Vm
from corral.model.vm import Disk, Port
from corral.units import MIB

ROOT = "root"
"""Name of the drive that the record calls ``disk``."""
NET_SLACK = 256 * MIB
"""Disk blocks that the host caches are counted with the VM that read them, and dropped before anything is ended."""


def hostname_of(vm: Vm) -> str:
    return vm.spec.hostname or vm.meta.name


def has_ssh(files: BootFiles) -> bool:
    """Somebody can log in: Corral can put its key there, through its agent or through cloud-init."""
    return files.agent or bool(files.default_user)


def wants_root(files: BootFiles) -> bool:
    """The VM gets a disk of its own (one that boots an installer CD gets an empty one)."""
    return files.disk is not None


def wants_seed(files: BootFiles) -> bool:
    """Images with a disk of their own read user data, host name and keys from a cloud-init seed."""
    return files.disk is not None and files.boot != "cdrom"


def machine_of(
    vm: Vm, files: BootFiles, *, root: Sequence[Path], seed: Path | None, ports: Iterable[Port],
    joins: tuple[Path, ...] = (), template: str | None = None,
) -> Machine:  # fmt: skip
    """The machine of a VM.

    Args:
        root: the layers of its root disk, the uppermost first, without the image; empty for none.
        ports: the ones written into its status. ``joins``: its control groups.
        template: id of what it is forked from; None: it boots.
    """
    if files.boot == "kernel" and files.kernel is None:
        raise Bug(f"image {files.digest} boots a kernel and has none")
    firmware = files.firmware if vm.spec.firmware == "auto" else vm.spec.firmware
    return Machine(
        id=vm.meta.id,
        name=vm.meta.name,
        epoch=vm.status.epoch,
        arch=files.arch,
        cpus=vm.spec.cpu.count,
        cpu_model=vm.spec.cpu.model,
        memory=vm.spec.memory.size,
        firmware="uefi" if firmware == "uefi" else "bios",
        kernel=_kernel(vm, files),
        drives=_drives(files, root, seed, limits_of(vm.spec.disk)),
        cards=_cards(vm, tuple(ports)),
        joins=joins,
        template=template,
    )


def memory_net(size: int, overhead: int, *, forked: bool) -> int:
    """Bytes at which the kernel ends a VM's processes: a safety net, far above all that its guest and its QEMU take.

    A fork that writes where its template never had a page is charged for that page twice: the template's and its own.
    """
    return size * (2 if forked else 1) + 2 * overhead + NET_SLACK


def _kernel(vm: Vm, files: BootFiles) -> KernelBoot | None:
    if files.boot != "kernel" or files.kernel is None:
        return None
    # For systemd, and (as a variable of init's) for the micro image. A name is checked to be a DNS label before it gets
    # here, so that nothing else can come in this way.
    cmdline = f"{files.cmdline} systemd.hostname={hostname_of(vm)} hostname={hostname_of(vm)}".strip()
    return KernelBoot(kernel=files.kernel, initrd=files.initrd, cmdline=cmdline)


def limits_of(disk: Disk) -> Limits:
    return Limits(
        iops=disk.iops or 0, bandwidth=disk.bandwidth or 0, iops_burst=disk.iops_burst or 0,
        bandwidth_burst=disk.bandwidth_burst or 0, burst_s=disk.burst_s,
    )  # fmt: skip


def _drives(files: BootFiles, root: Sequence[Path], seed: Path | None, limits: Limits) -> tuple[Drive, ...]:
    drives = []
    installer = files.boot == "cdrom"
    if root:
        below = tuple(Layer(path=path, format="qcow2") for path in root[1:])
        drives.append(
            Drive(
                name=ROOT, path=root[0], format="qcow2", layers=below if installer else (*below, *_image(files)),
                bootable=files.boot != "kernel", limits=limits,
            )
        )  # fmt: skip
    if installer and files.disk is not None:
        # After the root disk: an installed system boots from it, an empty one falls through to the installer.
        drives.append(Drive(name="cd", path=files.disk, format="raw", readonly=True, cdrom=True, bootable=True))
    if seed is not None:
        drives.append(Drive(name="seed", path=seed, format="raw", readonly=True))
    return tuple(drives)


def _image(files: BootFiles) -> tuple[Layer, ...]:
    """What lies under the root disk."""
    if files.disk is None:
        return ()
    return (Layer(path=files.disk, format="raw" if files.disk_format == "raw" else "qcow2"),)


def _cards(vm: Vm, ports: tuple[Port, ...]) -> tuple[Card, ...]:
    """Each forward belongs to the first card that publishes its guest port; SSH's to the first card of all."""
    cards = []
    left = list(ports)
    for number, nic in enumerate(vm.spec.nics):
        asked = {(f.protocol, f.address, f.guest) for f in nic.publish}
        mine = [
            p
            for p in left
            if (p.purpose == "ssh" and number == 0)
            or (p.purpose == "publish" and (p.protocol, p.address, p.guest) in asked)
        ]
        left = [p for p in left if p not in mine]
        forwards = tuple(
            HostForward(protocol="udp" if p.protocol == "udp" else "tcp", address=p.address, host=p.host, guest=p.guest)
            for p in mine
        )
        cards.append(Card(name=f"net{number}", mac=nic.mac, hostname=hostname_of(vm), forwards=forwards))
    return tuple(cards)
