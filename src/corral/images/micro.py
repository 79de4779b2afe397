"""The recipe ``micro``: a guest that runs from memory alone. Distribution kernel, busybox, dropbear, corral-guest.

Boots to the agent's answer in about two seconds under software emulation. What is in the guest stands as readable
files in ``inside/``; this module only gathers. Neighbours: :mod:`corral.images.kernel`, :mod:`corral.images.tree`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from corral.images.files import Manifest
from corral.images.guest_files import add_busybox, busybox
from corral.images.kernel import Modules, extract_vmlinux
from corral.images.recipe import AGENT_PATH, Ingredients
from corral.images.tree import Tree
from corral.runtime.program import run_program
from corral.units import MIB

CMDLINE = "console=ttyS0 quiet tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests lsm= audit=0"
"""Quiet, and without what only costs time in a virtual machine: timer calibration, crypto self-tests, audit."""

AGENT_MODULES = ("virtio_pci", "virtio_mmio", "virtio_console")
"""What corral-guest needs: loaded first."""
OTHER_MODULES = (
    "pvpanic_mmio", "pvpanic_pci", "virtio_net", "virtio_blk", "isofs", "virtio_rng", "virtio_balloon", "button",
    "evdev",
)  # fmt: skip
"""Telling the host of a panic (the ISA device through ACPI: mmio), network, seed, entropy, memory, power button."""

PROGRAMS = ("/usr/sbin/dropbear", "/usr/bin/dropbearkey", "/usr/bin/scp")


async def build(ingredients: Ingredients, directory: Path) -> Manifest:
    """Write ``kernel`` and ``initrd`` to ``directory``."""
    packages, work, say = ingredients.packages, ingredients.work, ingredients.progress
    say("downloading packages", 0, 4)
    names = await packages.closure(["dropbear-bin"])
    debs = await packages.download([*ingredients.kernel.packages, "busybox-static", *names], work / "debs")
    say("unpacking packages", 1, 4)
    root = work / "packages"
    await packages.unpack(debs, root)
    say("unpacking the kernel", 2, 4)
    modules = await Modules.open(root)
    await extract_vmlinux(root / f"boot/vmlinuz-{modules.release}", directory / "kernel")
    say("packing the guest", 3, 4)
    libraries = await _libraries(root)
    listed = await run_program([busybox(root), "--list"], what="listing busybox's commands", timeout_s=20)
    applets = listed.stdout.decode().split()
    tree = await asyncio.to_thread(_tree, ingredients, root, modules, libraries, applets)
    with (directory / "initrd").open("wb") as out:
        await asyncio.to_thread(tree.write_cpio, out)
    say("packing the guest", 4, 4)
    return Manifest(
        name="micro",
        arch=ingredients.arch,
        boot="kernel",
        cmdline=CMDLINE,
        min_memory=96 * MIB,
        agent=True,
    )


def _tree(
    ingredients: Ingredients, root: Path, modules: Modules, libraries: dict[str, Path], applets: list[str]
) -> Tree:
    tree, inside = Tree(), ingredients.inside
    for path in (
        "dev",
        "proc",
        "sys",
        "run",
        "mnt",
        "var/log",
        "var/lib",
        "etc/dropbear",
        "usr/bin",
        "usr/sbin",
        "bin",
        "sbin",
    ):
        tree.directory(path)
    tree.directory("tmp", 0o1777)
    tree.directory("root", 0o700)
    tree.device("dev/console", 5, 1)  # so that the kernel can give init a console before /dev is mounted
    tree.link("var/run", "../run")
    add_busybox(tree, busybox(root), applets)
    for program in PROGRAMS:
        if (root / program.lstrip("/")).exists():
            tree.file(program, root / program.lstrip("/"), 0o755)
    for name, library in libraries.items():
        tree.file(name, library, 0o755)
    tree.file(AGENT_PATH, ingredients.agent, 0o755)
    first = modules.order(AGENT_MODULES)
    rest = modules.order(OTHER_MODULES)
    for name in dict.fromkeys((*first, *rest)):
        tree.file(f"lib/modules/{name}.ko", modules.read(name))
    tree.file("lib/modules/agent.order", "\n".join(first) + "\n")
    tree.file("lib/modules/rest.order", "\n".join(name for name in rest if name not in first) + "\n")
    tree.file("init", inside / "micro-init", 0o755)
    tree.file("sbin/corral-init", inside / "corral-init", 0o755)
    tree.file("etc/udhcpc.sh", inside / "udhcpc.sh", 0o755)
    tree.file("etc/acpi/PWRF/00000080", "#!/bin/sh\npoweroff -f\n", 0o755)
    tree.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    tree.file("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")
    tree.file("etc/shells", "/bin/sh\n")
    tree.file("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
    tree.file("etc/profile", "export PATH=/bin:/sbin:/usr/bin:/usr/sbin\nexport PS1='\\u@\\h:\\w\\$ '\n")
    tree.file("etc/os-release", 'ID=corral-micro\nPRETTY_NAME="Corral micro guest"\n')
    return tree


async def _libraries(root: Path) -> dict[str, Path]:
    """Shared libraries that the programs need, as the distribution's own loader finds them: guest path → file."""
    loader = next(path for path in sorted(root.rglob("ld-linux-*.so.*")) if not path.is_symlink())
    folders = sorted({path.parent for path in root.rglob("*.so.*") if path.parent.name.endswith("-linux-gnu")})
    found: dict[str, Path] = {}
    for program in PROGRAMS:
        path = root / program.lstrip("/")
        if not path.exists():
            continue
        argv: list[str | Path] = [loader, "--library-path", ":".join(map(str, folders)), "--list", path]
        lines = (await run_program(argv, what="finding libraries", timeout_s=20)).stdout.decode().splitlines()
        for line in lines:
            name, arrow, rest = line.strip().partition(" => ")
            if arrow and rest.startswith(str(root)):
                found[f"usr/lib/{name}"] = Path(rest.split(" (")[0])
    return found | {"lib64/" + loader.name: loader} if found else {}
