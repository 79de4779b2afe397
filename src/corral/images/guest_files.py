"""Pieces that several recipes put into their guests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from corral.images.tree import Tree


def busybox(root: Path) -> Path:
    """The program in an unpacked busybox-static package."""
    return next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())


def add_busybox(tree: Tree, program: Path, applets: Iterable[str]) -> None:
    """Put busybox into a tree, with a link in /bin for each of its commands that are wanted."""
    tree.file("bin/busybox", program, 0o755)
    for applet in applets:
        if f"bin/{applet}" not in tree:
            tree.link(f"bin/{applet}", "busybox")
