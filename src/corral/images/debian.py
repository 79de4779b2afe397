"""The recipe ``debian``: a small full Debian on a disk. systemd, ssh, python3, corral-guest, qemu-guest-agent.

mmdebstrap makes the tree (as root, or as a plain user in a user namespace), ``mke2fs -d`` a file system of it without
mounting; one ext4 without partition table, which grows to its disk at boot. Kernel and a tiny initrd stay outside: no
boot loader, no firmware. Our own files are laid over the tree as one tar archive; they stand in ``inside/``.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from corral.errors import Unavailable
from corral.images.files import Manifest
from corral.images.guest_files import add_busybox, busybox
from corral.images.kernel import Modules, extract_vmlinux
from corral.images.micro import AGENT_MODULES, CMDLINE
from corral.images.packages import Distribution
from corral.images.recipe import AGENT_PATH, Ingredients
from corral.images.tree import Tree
from corral.runtime.program import run_program
from corral.units import GIB, MIB

DISK_SIZE = 2 * GIB
ROOT_MODULES = (*AGENT_MODULES, "virtio_blk", "ext4", "pvpanic_mmio", "pvpanic_pci")
"""Loaded by the tiny initrd: the root disk, the agent's port so that it is there when systemd starts the agent, and the
panic device, which nothing in Debian loads by itself."""
INCLUDE = (
    "systemd-sysv", "systemd-resolved", "dbus", "udev", "kmod", "openssh-server", "qemu-guest-agent", "python3",
    "python3-yaml", "iproute2", "iputils-ping", "netbase", "ca-certificates", "e2fsprogs", "less", "procps",
)  # fmt: skip
MASKED = (
    "e2scrub_reap.service", "systemd-timesyncd.service", "systemd-binfmt.service", "systemd-journal-flush.service",
    "systemd-networkd-wait-online.service", "systemd-pstore.service", "systemd-random-seed.service",
    "systemd-update-utmp.service", "systemd-machine-id-commit.service", "systemd-sysusers.service",
    "systemd-repart.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "proc-sys-fs-binfmt_misc.automount", "getty@tty1.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@configfs.service", "modprobe@dm_mod.service",
    "modprobe@loop.service", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer",
    "dpkg-db-backup.timer", "systemd-tmpfiles-clean.timer",
)  # fmt: skip
"""Units that a virtual machine does not need; each costs 0.1 to 0.6 s of a boot under software emulation."""
_DPKG = (
    "path-exclude=/usr/share/man/*", "path-exclude=/usr/share/locale/*", "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)  # fmt: skip
_STEPS = (
    ("running apt-get update", "fetching package lists"),
    ("downloading packages", "downloading packages"),
    ("extracting archives", "unpacking packages"),
    ("installing essential packages", "installing the base"),
    ("installing remaining packages", "installing packages"),
    ("running --customize-hook", "finishing the tree"),
    ("cleaning package lists", "finishing the tree"),
)
"""What mmdebstrap says, and what we call it; the position is the progress."""


def suite(here: Distribution) -> str:
    """The Debian release that goes into the guest: this machine's own, else the newest stable one."""
    return here.codename if here.id == "debian" and here.codename in ("bookworm", "trixie") else "trixie"


async def build(ingredients: Ingredients, directory: Path) -> Manifest:
    """Write ``kernel``, ``initrd`` and ``disk.qcow2`` to ``directory``."""
    packages, work, say = ingredients.packages, ingredients.work, ingredients.progress
    if shutil.which("mmdebstrap") is None:
        raise Unavailable("mmdebstrap is not installed; it builds the debian image", hint="run script/setup")
    if os.geteuid() != 0 and not (shutil.which("newuidmap") or shutil.which("fakechroot")):
        raise Unavailable(
            "building a Debian tree without being root needs newuidmap",
            hint="apt install uidmap, and give the user a range in /etc/subuid and /etc/subgid; or build as root",
        )
    total = len(_STEPS) + 2
    say("unpacking the kernel", 0, total)
    root = work / "packages"
    debs = await packages.download([*ingredients.kernel.packages, "busybox-static"], work / "debs")
    await packages.unpack(debs, root)
    modules = await Modules.open(root)
    await extract_vmlinux(root / f"boot/vmlinuz-{modules.release}", directory / "kernel")
    with (directory / "initrd").open("wb") as out:
        _initrd(ingredients, root, modules).write_cpio(out)
    overlay = work / "overlay.tar"
    with overlay.open("wb") as out:
        await asyncio.to_thread(_overlay(ingredients, modules).write_tar, out)
    disk = work / "root.ext4"
    await _bootstrap(ingredients, modules.release, overlay, disk, total)
    say("converting the disk", total - 1, total)
    await ingredients.converter.convert(disk, "raw", directory / "disk.qcow2", max_bytes=DISK_SIZE + 64 * MIB)
    return Manifest(
        name="debian",
        arch=ingredients.arch,
        boot="kernel",
        cmdline=CMDLINE,
        virtual_size=DISK_SIZE,
        min_memory=192 * MIB,
        agent=True,
    )


def _initrd(ingredients: Ingredients, root: Path, modules: Modules) -> Tree:
    """Just enough to mount the root disk."""
    tree = Tree()
    for path in ("dev", "proc", "mnt"):
        tree.directory(path)
    tree.device("dev/console", 5, 1)
    add_busybox(tree, busybox(root), ["sh"])
    names = modules.order(ROOT_MODULES)
    for name in names:
        tree.file(f"lib/modules/{name}.ko", modules.read(name))
    tree.file("lib/modules/root.order", "".join(f"{name}\n" for name in names))
    tree.file("init", ingredients.inside / "tiny-init", 0o755)
    return tree


def _overlay(ingredients: Ingredients, modules: Modules) -> Tree:
    """Everything of ours in the Debian tree. Paths are below /usr and /etc only: /lib is a link there."""
    tree, inside, units = Tree(), ingredients.inside, "etc/systemd/system"
    for path in modules.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            tree.file(f"usr/lib/modules/{modules.release}/{path.relative_to(modules.root)}", path)
    tree.file(AGENT_PATH, ingredients.agent, 0o755)
    tree.file("usr/sbin/corral-init", inside / "corral-init", 0o755)
    tree.file("usr/lib/corral/cloud-config", inside / "cloud-config", 0o755)
    for unit, target in (
        ("corral-guest.service", "sysinit.target"),
        ("corral-init.service", "multi-user.target"),
        ("corral-host-key.service", "multi-user.target"),
    ):
        tree.file(f"{units}/{unit}", inside / unit)
        tree.link(f"{units}/{target}.wants/{unit}", f"../{unit}")
    networkd = "systemd-networkd.service"
    tree.link(f"{units}/multi-user.target.wants/{networkd}", f"/usr/lib/systemd/system/{networkd}")
    # D-Bus starts it for whoever asks for it: in a template it is stopped (:mod:`corral.agent.templates.scripts`).
    tree.link(f"{units}/dbus-org.freedesktop.network1.service", f"/usr/lib/systemd/system/{networkd}")
    # sshd is started by the first connection: a guest that nobody logs in to never loads it, and no fork has one that
    # must be told to forget its template's key.
    tree.link(f"{units}/sockets.target.wants/ssh.socket", "/usr/lib/systemd/system/ssh.socket")
    for unit in MASKED:
        tree.link(f"{units}/{unit}", "/dev/null")
    tree.file(f"{units}/serial-getty@ttyS0.service.d/corral.conf", inside / "autologin.conf")
    tree.file(f"{units}/qemu-guest-agent.service.d/corral.conf", inside / "qemu-guest-agent.conf")
    tree.file("etc/systemd/network/80-corral.network", inside / "corral.network")
    tree.file("etc/ssh/sshd_config.d/corral.conf", inside / "sshd.conf")
    tree.file("etc/systemd/resolved.conf.d/corral.conf", "[Resolve]\nLLMNR=no\nMulticastDNS=no\n")
    tree.file("etc/fstab", "/dev/vda / ext4 defaults,noatime 0 1\n")
    tree.file("etc/hostname", "debian\n")
    tree.file("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost\n")
    tree.file("etc/default/locale", "LANG=C.UTF-8\n")
    tree.file("etc/machine-id", "", 0o444)  # empty: made anew at first boot, without counting as a factory reset
    return tree


async def _bootstrap(ingredients: Ingredients, release: str, overlay: Path, disk: Path, total: int) -> None:
    """Run mmdebstrap, whose last hook writes the file system into ``disk``.

    The hook gets the file by its descriptor: in a user namespace it runs as a user who cannot enter our directories.
    """
    descriptor = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(descriptor, DISK_SIZE)
        os.fchmod(descriptor, 0o666)  # its directory stays closed to others
        done = 0

        def on_line(line: str) -> None:
            nonlocal done
            for number, (said, step) in enumerate(_STEPS, start=1):
                if said in line and number > done:
                    done = number
                    ingredients.progress(step, number, total)

        sources = await ingredients.packages.sources(ingredients.suite)
        argv = _mmdebstrap(ingredients.suite, release, overlay, descriptor, sources)
        env = {"TMPDIR": "/var/tmp"}  # /tmp may be memory
        await run_program(
            argv, what="building the Debian tree", timeout_s=1500, env=env, pass_fds=[descriptor], on_line=on_line
        )
    finally:
        os.close(descriptor)


def _mmdebstrap(suite: str, release: str, overlay: Path, descriptor: int, sources: Sequence[str]) -> list[str]:
    # D-Bus has a machine-id of its own, which systemd would take over at the first boot: all guests would be the same.
    tidy = (
        'rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/etc/ssh/ssh_host_* "$1"/var/lib/systemd/random-seed'
        ' "$1"/var/lib/dbus/machine-id "$1"/etc/systemd/system/multi-user.target.wants/ssh.service'
    )
    make = (
        'set -e; view=$(mktemp -d); mount --bind "$1" "$view" 2>/dev/null || { rmdir "$view"; view=$1; }; '
        "mke2fs -q -F -t ext4 -L root -m 1 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard "
        f'-d "$view" /proc/self/fd/{descriptor}; '
        '[ "$view" = "$1" ] || { umount "$view"; rmdir "$view"; }'
    )
    return [
        "mmdebstrap", "--mode=auto", "--variant=apt", "--components=main", "--format=null",
        f"--include={','.join(INCLUDE)}",
        *(f"--dpkgopt={option}" for option in _DPKG),
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::Retries "2"',
        f"--customize-hook=tar-in {overlay} /",
        f'--customize-hook=chroot "$1" depmod {release}',
        f"--customize-hook={tidy}",
        f"--customize-hook={make}",
        suite, "/dev/null", *sources,
    ]  # fmt: skip
