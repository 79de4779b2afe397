"""``corral run --mount``: a directory of this machine in the guest, as a copy that goes in before and comes back after.

A copy, because the guests' kernels have no 9p, and virtiofs shares memory with a daemon on the host, which a guest
forked from a template (its memory is private) cannot. What the guest changed, added or removed is carried over when the
program has ended, file by file; what was changed here meanwhile stays as it is here, and is told. Nothing is written
through a link, or outside the directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from corral.errors import Invalid, Problem, Refused

if TYPE_CHECKING:
    from corral.client import Client

Complain = Callable[[str, str], None]
# In the guest: make the directory, fill it, and seal it if it is read-only. $1 directory, $2 ro or rw.
_TAKE = """
mkdir -p -- "$1" && tar -x -p -f - -C "$1" || exit 1
[ "$2" = rw ] || { mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"; }
"""


class Mount(NamedTuple):
    """``guest`` is absolute."""

    host: Path
    guest: str
    readonly: bool


class Trace(NamedTuple):
    """What tells one state of a file from another."""

    kind: int
    mode: int
    size: int
    changed_ns: int
    link: str = ""


Traces = dict[str, Trace]
"""By path below the directory."""


def parse_mount(word: str) -> Mount:
    """``DIR[:GUEST][:ro]``; GUEST is ``/mnt/NAME`` if it is not given. Raises a usage error, Invalid."""
    rest, readonly = (word[:-3], True) if word.endswith(":ro") else (word.removesuffix(":rw"), False)
    place, colon, inner = rest.rpartition(":/")
    host = Path(place if colon else rest)
    guest = os.path.normpath(f"/{inner}") if colon else f"/mnt/{host.resolve().name}"
    if not str(host) or guest == "/":
        raise click.BadParameter(f"{word!r} is not DIR[:/GUEST][:ro]", param_hint="--mount")
    if not host.is_dir():
        raise Invalid([Problem("--mount", f"{host} is no directory")], code="usage")
    return Mount(host.resolve(), guest, readonly)


class Mounted:
    """One mount of one run. :meth:`enter` before the program, :meth:`leave` after it."""

    def __init__(self, client: Client, vm: str, mount: Mount) -> None:
        self._client, self._vm, self._mount = client, vm, mount
        self._then: Traces = {}

    def enter(self) -> None:
        """Copy the directory in; what cannot be copied (devices, sockets, unreadable files) is left out."""
        from corral.client.sync.files import give_stream
        from corral.client.sync.pack import pack

        host, left_out = self._mount.host, set[str]()
        self._then = traces(host)
        script = ("sh", "-c", _TAKE, "corral-mount", self._mount.guest, "ro" if self._mount.readonly else "rw")
        with give_stream(self._client, self._vm, script) as program:
            pack(host, ".", program, skipped=lambda path, _why: left_out.add(path), progress=lambda _count: None)
        for path in left_out:
            self._then.pop(os.path.relpath(path, host), None)

    def leave(self, complain: Complain, limit: Callable[[int], None]) -> None:
        """Carry over what the guest changed. ``complain`` is told of what is not, ``limit`` of bytes that come."""
        if self._mount.readonly:
            return
        import tempfile  # here, like all that only a mount needs: `corral run` starts in a tenth of a second

        from corral.client.sync.files import fetch

        refused: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="corral-mount-") as place:
            fetch(
                self._client, self._vm, self._mount.guest, Path(place) / "tree", recursive=True,
                complain=lambda name, why: refused.update({_below(name): why}), progress=limit,
            )  # fmt: skip
            carry(Path(place) / "tree", self._mount.host, self._then, refused, complain)


def _below(name: str) -> str:
    """``./top/a/b`` as ``a/b``."""
    return "/".join([part for part in name.split("/") if part not in ("", ".")][1:])


def traces(top: Path) -> Traces:
    """Everything below a directory that can be copied; links are not followed."""
    found: Traces = {}
    for directory, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = Path(directory, name)
            seen = path.lstat()
            kind = stat.S_IFMT(seen.st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                link = os.readlink(path) if kind == stat.S_IFLNK else ""  # noqa: PTH115 - a Path would lose a slash
                size, changed = (seen.st_size, seen.st_mtime_ns) if kind == stat.S_IFREG else (0, 0)
                mode = 0 if kind == stat.S_IFLNK else stat.S_IMODE(seen.st_mode) & 0o777
                found[str(path.relative_to(top))] = Trace(kind, mode, size, changed, link)
    return found


def carry(tree: Path, host: Path, then: Traces, refused: dict[str, str], complain: Complain) -> None:
    """Make ``host`` what ``tree`` is, as far as it still is what it was ``then``.

    ``refused``: what was not taken out of the guest, and why.
    """
    came, now = traces(tree), traces(host)
    for name in sorted(then.keys() - came.keys(), reverse=True):
        if name in refused and then[name].kind == stat.S_IFLNK:
            continue  # a link that leads out of the directory: it went in as it is, and stays
        if name in now and not any(name == one or name.startswith(f"{one}/") for one in refused):
            _remove(host, name, now[name] == then[name], complain)
    for name in sorted(came):
        if _same(tree / name, came[name], host / name, now.get(name)):
            continue
        if now.get(name) != then.get(name):
            complain(name, "it was changed here too: yours stays")
        elif _below_link(host, name):
            complain(name, "it lies below a link")
        else:
            _put(tree / name, came[name], host / name, lambda why, name=name: complain(name, why))  # type: ignore[misc]
    for name, why in refused.items():
        if name not in then:
            complain(name, why)


def _same(new: Path, came: Trace, old: Path, now: Trace | None) -> bool:
    if now is None or (came.kind, came.size, came.link) != (now.kind, now.size, now.link):
        return False
    # Directories are unpacked so that their owner can write in them, whatever they were.
    always = stat.S_IRWXU if came.kind == stat.S_IFDIR else 0
    if came.mode | always != now.mode | always:
        return False
    if came.kind != stat.S_IFREG:
        return True
    import filecmp

    return filecmp.cmp(new, old, shallow=False)


def _below_link(host: Path, name: str) -> bool:
    return any((host / above).is_symlink() for above in list(Path(name).parents)[:-1])


def _put(new: Path, came: Trace, old: Path, complain: Callable[[str], None]) -> None:
    """One entry, at once or not at all."""
    was_directory = old.is_dir() and not old.is_symlink()
    if came.kind == stat.S_IFDIR:
        if not was_directory:
            old.unlink(missing_ok=True)
            old.mkdir()
        old.chmod(came.mode)
        return
    if was_directory:
        try:
            old.rmdir()
        except OSError:
            complain("the guest put something else in its place, but there is something in it here: it stays")
            return
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory(prefix=".corral-", dir=old.parent) as place:
        beside = Path(place) / "new"
        if came.kind == stat.S_IFLNK:
            beside.symlink_to(came.link)
        else:
            shutil.copyfile(new, beside)
            beside.chmod(came.mode)
        beside.replace(old)


def _remove(host: Path, name: str, unchanged: bool, complain: Complain) -> None:
    path = host / name
    if not unchanged:
        complain(name, "the guest removed it, but it was changed here: it stays")
    elif _below_link(host, name):
        complain(name, "it lies below a link")
    elif path.is_dir() and not path.is_symlink():
        try:
            path.rmdir()
        except OSError:
            complain(name, "the guest removed it, but there is something in it here: it stays")
    else:
        path.unlink()


def bounded(most: int) -> Callable[[int], None]:
    """A count of bytes that come out of a guest, which raises Refused ``too-large`` above ``most``."""
    left = most

    def count(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise Refused("the guest has more than may be copied out of it", code="too-large")

    return count
