"""Files into and out of a guest, as tar streams through a program there. For ``corral cp``, ``run`` and sandboxes.

What a guest sends is unpacked by :mod:`corral.client.sync.unpack`, which trusts nothing of it.
"""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from corral.client.sync.pack import check_source, pack
from corral.client.sync.unpack import take_file, unpack
from corral.errors import CorralError, Invalid, NotFound, Problem, Unavailable

if TYPE_CHECKING:
    from corral.client.sync import Client
    from corral.client.sync.sockets import Exec

# In the guest: say where the copy goes, then unpack it there. $1 path, $2 name of the source.
_TAKE = """
if [ -d "$1" ]; then d=$1 n=$2; else d=$(dirname -- "$1") n=$(basename -- "$1"); fi
case $1 in */) [ -d "$1" ] || { echo "$1 is no directory" >&2; exit 1; };; esac
[ -d "$d" ] || { echo "there is no directory $d" >&2; exit 1; }
[ "$3" = dir ] || [ ! -d "$d/$n" ] || { echo "$d/$n is a directory" >&2; exit 1; }
printf '%s\\n' "$n"
exec tar -x -p -f - -C "$d"
"""
# In the guest: pack a file or a tree. $1 directory, $2 name, $3 path as given, $4 "tree" or "file".
_GIVE = """
[ -e "$3" ] || [ -L "$3" ] || { echo "there is no $3" >&2; exit 3; }
if [ "$4" = file ]; then
  [ ! -d "$3" ] || { echo "$3 is a directory: copy directories with -r" >&2; exit 4; }
  [ -f "$3" ] || { echo "$3 is not a regular file" >&2; exit 4; }
  exec tar -c -h -f - -C "$1" "./$2"
fi
p=$3
[ ! -L "$p" ] || p=$(readlink -f -- "$p")
exec tar -c -f - -C "$(dirname -- "$p")" "./$(basename -- "$p")"
"""


Complain = Callable[[str, str], None]
"""Told of each entry that is not copied, and why."""
Count = Callable[[int], None]
"""Told of bytes that went."""


def send(
    client: Client, source: Path, vm: str, target: str, *, recursive: bool, complain: Complain, progress: Count
) -> None:
    """Copy a file, or with ``recursive`` a directory, to ``target`` in a VM; into it if that is a directory.

    Raises Invalid for what cannot be copied, CorralError with the guest's words.
    """
    check_source(source, recursive=recursive)
    what = "dir" if source.is_dir() else "file"
    script = ("sh", "-c", _TAKE, "corral-cp", target, source.resolve().name, what)
    with client.vms.exec(vm, script) as program:
        answer = Answer(program, vm)
        inner = answer.first_line()
        answer.drain_in_background()
        try:
            pack(source, inner, program, skipped=complain, progress=progress)
            program.eof()
        except Unavailable:
            pass  # tar ended before it had read all: its status says whether that is right
        answer.finish()


def fetch(
    client: Client, vm: str, source: str, target: Path, *, into: bool = False, recursive: bool, complain: Complain,
    progress: Count,
) -> None:  # fmt: skip
    """Copy ``source`` of a VM to ``target`` here. ``into``: the target must be a directory.

    Raises Invalid, NotFound, CorralError with the guest's words.
    """
    parent, name = posixpath.split(posixpath.normpath(source))
    if not name:
        raise Invalid([Problem(source, "the whole guest is too much", "a file or directory in it")])
    if into and not target.is_dir():
        raise Invalid([Problem(str(target), "there is no such directory")])
    place = target / name if target.is_dir() else target
    if not place.parent.is_dir():
        raise Invalid([Problem(str(place.parent), "there is no such directory")])
    if not recursive and place.is_dir():
        raise Invalid([Problem(str(place), "it is a directory")])
    script = ("sh", "-c", _GIVE, "corral-cp", parent, name, source, "tree" if recursive else "file")
    with client.vms.exec(vm, script) as program:
        program.eof()
        answer = Answer(program, vm)
        try:
            if recursive:
                unpack(answer, place, refused=complain, progress=progress)
            else:
                take_file(answer, place, progress=progress)
        except CorralError:
            answer.finish()  # if the guest's side failed, its own words are the better reason
            raise
        answer.finish()


@contextmanager
def give_stream(client: Client, vm: str, script: tuple[str, ...]) -> Iterator[Exec]:
    """A program in the guest that reads what the block writes. Raises CorralError unless it ends well."""
    with client.vms.exec(vm, script) as program:
        answer = Answer(program, vm)
        answer.drain_in_background()
        with suppress(Unavailable):  # it ended before it had read all: its status says whether that is right
            yield program
            program.eof()
        answer.finish()


class Answer:
    """What the program in the guest says: stdout as a stream to read, stderr kept for the error, then the status."""

    def __init__(self, program: Exec, vm: str) -> None:
        self._program, self._vm = program, vm
        self._rest = b""
        self._complaint = b""
        self._failure: CorralError | None = None
        self._thread: threading.Thread | None = None

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, at least one; nothing at the end."""
        while not self._rest:
            piece = self._program.read()
            if piece is None:
                return b""
            if piece.stream == 2:
                self._complaint = (self._complaint + piece.data)[-2000:]
            else:
                self._rest = piece.data
        data, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        return data

    def first_line(self) -> str:
        """The first line of stdout, without its end. Raises what went wrong if there is none."""
        found = b""
        while not found.endswith(b"\n"):
            byte = self.read(1)
            if not byte or len(found) > 4096:
                self.finish()
                raise CorralError(f"{self._vm}: the guest did not say where the copy goes", code="guest")
            found += byte
        return found[:-1].decode(errors="surrogateescape")

    def drain_in_background(self) -> None:
        """Go on reading while something is written: a guest that complains must not wait for us."""
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        try:
            while self.read():
                pass
        except CorralError as error:
            self._failure = error

    def finish(self) -> None:
        """Read to the end. Raises CorralError with the guest's words unless its status is 0."""
        if self._thread is not None:
            self._thread.join()
        else:
            self._drain()
        if self._failure is not None:
            raise self._failure
        if self._program.status != 0:
            words = self._complaint.decode(errors="replace").strip().splitlines()
            reason = words[-1] if words else f"status {self._program.status}"
            if self._program.status == 3:
                raise NotFound(f"{self._vm}: {reason}", hint=f"corral exec {self._vm} -- ls -l shows what is there")
            raise CorralError(f"{self._vm}: {reason}", code="guest", hint="nothing else was copied")
