"""From a :class:`~corral.engine.protocol.Machine` to QEMU's arguments: a pure function, no file is looked at.

Everything that carries text from outside travels as JSON (``-blockdev``, ``-device``, ``-netdev``, ``-object``) or as
an argument of its own (``-kernel``, ``-append``); strings of the form ``k=v,k=v`` are built from constants and
numbers only. The layout is one that a fork of the running machine can repeat: RAM is one private mapping (id ``mem``),
every device has a fixed address. Read :mod:`corral.engine.qemu.launcher` next: who runs it.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from corral.engine.overlays import MAX_LAYERS
from corral.engine.protocol import Card, Drive, Layer, Limits, Machine
from corral.engine.qemu.arch import Arch, arch_of
from corral.engine.qemu.firmware import Firmware
from corral.engine.qemu.throttle import group, limit_problems, limits_of
from corral.errors import Invalid, Problem

TB_SIZE_MIB = 32
"""Bound of TCG's translation buffer: with 16 MiB forks get clearly slower, beyond 32 the gain is within the noise."""
FREE_PORTS = 8
"""Empty PCIe ports for hot-plug, at most one slot full: each one costs the guest boot time."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,199}")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
SOCKETS = ("qmp", "serial", "guest", "qga")
"""Channels of every machine: listening sockets made by the launcher, inherited by QEMU."""
_DEVICE_SLOTS = {"vserial": 2, "rng": 3, "balloon": 4, "scsi": 5}
_FIRST_PORT_SLOT, _FREE_PORT_SLOT = 8, 16


@dataclass(frozen=True)
class Warm:
    """What a fork starts from, as descriptors in QEMU: its template's memory and the state of its devices."""

    memory: int
    state: int


@dataclass(frozen=True)
class Surroundings:
    """What the command line needs besides the machine.

    ``sockets``: descriptor of each of :data:`SOCKETS` in QEMU. ``firmware``: what is put in as flash. ``variables``:
    the VM's own copy of the firmware's variable store (UEFI only). ``warm``: for a fork.
    """

    accelerator: str
    sockets: dict[str, int]
    binary: str
    firmware: Firmware | None = None
    variables: Path | None = None
    warm: Warm | None = None


def build(machine: Machine, around: Surroundings) -> list[str]:
    """QEMU's arguments, program first. Raises :class:`Invalid` with every problem when the machine cannot be built."""
    check(machine)
    assert set(around.sockets) == set(SOCKETS), "every channel needs its socket"
    assert (machine.firmware == "uefi") == (around.variables is not None)
    arch = arch_of(machine.arch)
    argv = [around.binary, "-name", f"guest={_plain(machine.name)}", "-uuid", machine.id]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX, "-S"]
    argv += _board(machine, around, arch)
    argv += _memory(machine, around.warm)
    argv += _end_of_life()
    argv += _channels(around, arch)
    argv += _platform_devices(machine, arch)
    argv += _ports(len([d for d in machine.drives if not d.cdrom]) + len(machine.cards))
    port = 0
    for index, drive in enumerate(machine.drives, 1):  # boot index 0 is taken by a directly booted kernel
        argv += _drive(
            drive, boot_index=index if drive.bootable else None, port=f"port{port}", warm=around.warm is not None
        )
        port += not drive.cdrom
    for card in machine.cards:
        argv += _card(card, f"port{port}")
        port += 1
    return argv


def _board(machine: Machine, around: Surroundings, arch: Arch) -> list[str]:
    kvm = around.accelerator == "kvm"
    model = machine.cpu_model or ("host" if kvm else arch.cpu_emulated)
    board = arch.machine + ",memory-backend=mem"
    argv: list[str] = []
    if around.firmware is not None:
        parts = [("pflash-code", around.firmware.code, around.firmware.format, True)]
        if around.variables is not None:
            parts.append(("pflash-vars", around.variables, "raw", False))
        for unit, (node, path, form, readonly) in enumerate(parts):
            file = {"driver": "file", "filename": str(path)}
            argv += _json("-blockdev", {"driver": form, "node-name": node, "read-only": readonly, "file": file})
            board += f",pflash{unit}={node}"
    argv = ["-machine", board, "-cpu", model, *argv]
    argv += ["-accel", "kvm" if kvm else f"tcg,thread=multi,tb-size={TB_SIZE_MIB}"]
    argv += ["-smp", f"cpus={machine.cpus},sockets=1,cores={machine.cpus},threads=1"]
    name = _plain(machine.name)
    argv += ["-smbios", f"type=1,manufacturer=Corral,product=Virtual Machine,uuid={machine.id},sku={name}"]
    argv += ["-rtc", "base=utc", "-boot", "menu=off,strict=on"]
    if machine.kernel is not None:
        argv += ["-kernel", str(machine.kernel.kernel)]
        if machine.kernel.initrd is not None:
            argv += ["-initrd", str(machine.kernel.initrd)]
        argv += ["-append", machine.kernel.cmdline]
    return argv


def _memory(machine: Machine, warm: Warm | None) -> list[str]:
    """Guest memory, private and never merged with another guest's: anonymous, or copy-on-write over a template's.

    A saved state has no section that names its machine type, hence the setting: the template's record names all.
    """
    argv = ["-m", f"size={machine.memory >> 10}k"]
    memory: dict[str, object] = {"id": "mem", "size": machine.memory, "share": False, "merge": False}
    if warm is None:
        return argv + _json("-object", {"qom-type": "memory-backend-ram", **memory})
    file = {"qom-type": "memory-backend-file", "mem-path": f"/proc/self/fd/{warm.memory}"}
    incoming = ["-global", "migration.send-configuration=off", "-incoming", f"fd:{warm.state}"]
    return argv + _json("-object", {**file, **memory}) + incoming


def _end_of_life() -> list[str]:
    """Power-off ends the process, reboot is a reset, a panic stops the CPUs and is reported.

    The trace point leaves the reason of an end on stderr, so that it can be told even when nobody listened to QMP.
    """
    return ["-action", "reboot=reset,shutdown=poweroff,panic=pause,watchdog=reset", "-trace", SHUTDOWN_TRACE]


SHUTDOWN_TRACE = "qemu_system_shutdown_request"


def _channels(around: Surroundings, arch: Arch) -> list[str]:
    argv: list[str] = []
    for name in SOCKETS:
        argv += ["-chardev", f"socket,id={name},fd={around.sockets[name]},server=on,wait=off"]
    argv += ["-mon", "chardev=qmp,mode=control"]
    if arch.isa:
        return argv + _json("-device", {"driver": "isa-serial", "id": "serial0", "chardev": "serial"})
    return [*argv, "-serial", "chardev:serial"]


def _platform_devices(machine: Machine, arch: Arch) -> list[str]:
    """What every machine has, directly on the root bus: never unplugged."""

    def at(driver: str, id: str, **more: object) -> list[str]:
        return _json("-device", {"driver": driver, "id": id, "bus": ROOT_BUS, "addr": hex(_DEVICE_SLOTS[id]), **more})

    argv = at("virtio-serial-pci", "vserial")
    for number, (chardev, name) in enumerate((("guest", "org.corral.guest.0"), ("qga", "org.qemu.guest_agent.0")), 1):
        port = {"driver": "virtserialport", "id": f"{chardev}-port", "bus": "vserial.0", "nr": number}
        argv += _json("-device", {**port, "chardev": chardev, "name": name})
    argv += _json("-object", {"qom-type": "rng-random", "id": "entropy", "filename": "/dev/urandom"})
    argv += at("virtio-rng-pci", "rng", rng="entropy")
    argv += at("virtio-balloon-pci", "balloon", **{"free-page-reporting": True, "deflate-on-oom": True})
    if any(drive.cdrom for drive in machine.drives):
        argv += at("virtio-scsi-pci", "scsi")
    argv += _json("-device", {"driver": "pvpanic" if arch.isa else "pvpanic-pci", "id": "panic"})
    if arch.vmgenid:
        argv += _json("-device", {"driver": "vmgenid", "id": "generation", "guid": "auto"})
    return argv


ROOT_BUS = "pcie.0"


def _ports(used: int) -> list[str]:
    """PCIe ports ``port0…`` for the machine's own drives and cards, and ``free0…`` for what is plugged in later.

    Eight share a slot as its functions. They reserve no I/O space: virtio needs none, and 16 ports would use all of it.
    """
    argv: list[str] = []
    names = [(f"port{n}", _FIRST_PORT_SLOT + n // 8, n % 8) for n in range(used)]
    names += [(f"free{n}", _FREE_PORT_SLOT, n) for n in range(FREE_PORTS)]
    for chassis, (name, slot, function) in enumerate(names, 1):
        port = {"driver": "pcie-root-port", "id": name, "bus": ROOT_BUS, "chassis": chassis, "slot": chassis}
        argv += _json("-device", {**port, "addr": f"{slot:#x}.{function}", "multifunction": True, "io-reserve": 0})
    return argv


def _drive(drive: Drive, *, boot_index: int | None, port: str, warm: bool) -> list[str]:
    """A drive's chain of block nodes: file → format → throttle filter (named after the drive, on top), and its device.

    The filter is there from the start, limits or not, since it cannot be slipped under a device later.
    ``warm``: in a fork holes are not punched (see launcher/launch.c), so none is asked for.
    """
    node = drive.name
    throttle: dict[str, object] = {"qom-type": "throttle-group", "id": group(node)}
    if drive.limits != Limits():
        throttle["limits"] = limits_of(drive.limits)
    form = disk_node(drive, node=f"{node}-format", discard=not warm)
    top: dict[str, object] = {"driver": "throttle", "node-name": node, "throttle-group": group(node)}
    argv = _json("-object", throttle)
    argv += _json("-blockdev", {**top, "read-only": drive.readonly, "file": form})
    device: dict[str, object] = {"id": f"disk-{node}", "drive": node}
    if boot_index is not None:
        device["bootindex"] = boot_index
    if drive.cdrom:
        return argv + _json("-device", {"driver": "scsi-cd", "bus": "scsi.0", **device})
    return argv + _json("-device", {"driver": "virtio-blk-pci", "bus": port, "serial": node, **device})


def disk_node(drive: Drive, *, node: str, discard: bool = True, layers: bool = True) -> dict[str, object]:
    """The format node. A qcow2's backing file is what the record says or none at all, never what its header says."""
    form: dict[str, object] = {
        "driver": drive.format,
        "node-name": node,
        "read-only": drive.readonly,
        "file": _file(drive.path, drive.readonly, discard),
    }
    if not drive.readonly and discard:
        form |= {"discard": "unmap", "detect-zeroes": "unmap"}
    if drive.format == "qcow2":
        form["backing"] = _layers(drive.layers) if layers else None
    return form


def _layers(layers: Sequence[Layer]) -> dict[str, object] | None:
    """The chain under an overlay, from the bottom up."""
    under: dict[str, object] | None = None
    for layer in reversed(layers):
        base: dict[str, object] = {"driver": layer.format, "read-only": True, "file": _file(layer.path, True, False)}
        if layer.format == "qcow2":
            base["backing"] = under
        under = base
    return under


def _file(path: Path, readonly: bool, discard: bool) -> dict[str, object]:
    # A writable one inherits that from its format node: when that becomes a layer QEMU opens the file again read-only.
    file: dict[str, object] = {"driver": "file", "filename": str(path)}
    if readonly:
        file["read-only"] = True
    elif discard:
        file["discard"] = "unmap"
    return file


def _card(card: Card, port: str) -> list[str]:
    forwards = [{"str": f"{f.protocol}:{f.address}:{f.host}-:{f.guest}"} for f in card.forwards]
    netdev: dict[str, object] = {"type": "user", "id": f"net-{card.name}", "hostname": card.hostname}
    if forwards:
        netdev["hostfwd"] = forwards
    device = {"driver": "virtio-net-pci", "id": f"nic-{card.name}", "netdev": f"net-{card.name}", "mac": card.mac}
    # No option ROM: network boot is not offered, and loading it costs every start. A guest that goes on from a saved
    # state is not asked to announce itself: a fork is somebody else, and in Linux 6.12 a guest that is asked while its
    # card is taken down waits for itself for ever.
    return _json("-netdev", netdev) + _json("-device", {**device, "bus": port, "romfile": "", "guest_announce": False})


def _json(option: str, value: dict[str, object]) -> list[str]:
    return [option, json.dumps(value, ensure_ascii=True, separators=(",", ":"))]


def _plain(name: str) -> str:
    """A name as it may stand in a ``k=v`` option: everything that is not a plain character becomes ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:64] or "_"


def check(machine: Machine) -> None:
    """Raise :class:`Invalid` with *all* that stands in the way of building this machine."""
    problems = [*_board_problems(machine)]
    names: list[str] = []
    for drive in machine.drives:
        names.append(drive.name)
        problems += _name_problems("drives.name", drive.name)
        for path in (drive.path, *(layer.path for layer in drive.layers)):
            problems += _path_problems("drives.path", path)
        problems += _layer_problems(drive)
        if drive.cdrom and not drive.readonly:
            problems.append(Problem("drives.readonly", "a CD-ROM cannot be written", "readonly"))
        problems += limit_problems(drive.limits)
    for card in machine.cards:
        problems += _name_problems("cards.name", card.name)
        if not _MAC.fullmatch(card.mac):
            problems.append(Problem("cards.mac", f"{card.mac[:40]!r} is not a MAC address", "52:54:00:xx:xx:xx"))
        if card.hostname and not _HOSTNAME.fullmatch(card.hostname):
            problems.append(Problem("cards.hostname", f"{card.hostname[:40]!r} is not a host name"))
        problems += _forward_problems(card)
    for what, given in (("drives", names), ("cards", [card.name for card in machine.cards])):
        if len(set(given)) != len(given):
            problems.append(Problem(what, "two of them have the same name"))
    if len(machine.drives) + len(machine.cards) > 32:
        problems.append(Problem("drives", "more than 32 drives and cards do not fit"))
    if problems:
        raise Invalid(problems)


def _board_problems(machine: Machine) -> Iterable[Problem]:
    if not _UUID.fullmatch(machine.id):
        yield Problem("id", f"{machine.id[:40]!r} is not a UUID")
    if machine.cpu_model is not None and not _CPU.fullmatch(machine.cpu_model):
        yield Problem("cpu_model", f"{machine.cpu_model[:40]!r} is not a CPU model")
    if not 1 <= machine.cpus <= 255:
        yield Problem("cpus", f"{machine.cpus} is out of range", "1 to 255")
    if machine.memory < 1 << 20 or machine.memory % 4096:
        yield Problem("memory", f"{machine.memory} bytes cannot be guest memory", "whole pages, at least 1 MiB")
    if machine.kernel is not None:
        for path in filter(None, (machine.kernel.kernel, machine.kernel.initrd)):
            yield from _path_problems("kernel", path)
        if "\0" in machine.kernel.cmdline or len(machine.kernel.cmdline) > 2047:
            yield Problem("kernel.cmdline", "has a NUL or is longer than 2047 bytes")


def _name_problems(field: str, name: str) -> Iterable[Problem]:
    if not _NAME.fullmatch(name):
        yield Problem(field, f"{name[:40]!r} is not a device name", "a-z, 0-9 and -, at most 20")


def _path_problems(field: str, path: Path) -> Iterable[Problem]:
    if not path.is_absolute() or "\0" in str(path):
        yield Problem(field, f"{str(path)[:80]!r} is not an absolute path")


def _layer_problems(drive: Drive) -> Iterable[Problem]:
    if len(drive.layers) > MAX_LAYERS:
        yield Problem("drives.layers", f"{len(drive.layers)} layers under one disk", f"at most {MAX_LAYERS}")
    if drive.layers and any(layer.format == "raw" for layer in drive.chain[:-1]):
        yield Problem("drives.layers", "a raw file cannot lie over another one", "qcow2")


def _forward_problems(card: Card) -> Iterable[Problem]:
    for forward in card.forwards:
        try:
            ipaddress.IPv4Address(forward.address)
        except ValueError:
            yield Problem("ports", f"{forward.address[:40]!r} is not an IPv4 address")
        if forward.protocol not in ("tcp", "udp") or not (0 < forward.host < 65536 and 0 < forward.guest < 65536):
            yield Problem("ports", f"{forward.host} → {forward.guest} is not a pair of ports", "1 to 65535")
