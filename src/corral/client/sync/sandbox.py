"""A throw-away VM, for synchronous callers; the twin of :mod:`corral.client.aio.sandbox`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.client.held import (
    MAX_OUTPUT,
    MAX_PROCESSES,
    Held,
    Limits,
    limits_of,
    refuse_entry,
    sandbox_spec,
)
from corral.client.record import Accepted, Record, Result
from corral.client.sync.hold import Hold
from corral.errors import CorralError, NotFound, Refused, Unavailable, Unknown
from corral.units import parse_size

if TYPE_CHECKING:
    from corral.client.sync import Client
    from corral.client.sync.sockets import Exec


class Sandbox:
    """A VM whose guest answers, and which is gone after its block. Made by :func:`sandbox`."""

    def __init__(self, client: Client, vm: Record, hold: Hold, limits: Limits) -> None:
        self.client, self.vm, self.limits = client, vm, limits
        self._hold = hold

    @property
    def id(self) -> str:
        return self.vm.id

    @property
    def name(self) -> str:
        return self.vm.name

    def run(
        self, *argv: str, input: bytes | str = b"", env: Mapping[str, str] | None = None, cwd: str = "", user: str = "",
        timeout: float | None = None, max_output: int | str | None = "", processes: int | None = 0, check: bool = False,
    ) -> Result:  # fmt: skip
        """Run a program to its end: its status (128+n for a signal), what it printed, the limit it reached.

        Args:
            input: its stdin. ``env``: variables besides the usual ones. ``user``: as whom, default root.
            timeout: seconds; then it is killed and TimedOut raised.
            max_output: bytes (or like ``"1M"``) that it may print, then it is killed; default: the sandbox's limit.
            processes: how many it may have at once; default: the sandbox's limit.
            check: raise CorralError ``guest`` for a status other than 0.

        Raises CorralError ``guest`` if it cannot be started, and what became of the VM if that is over.
        """
        most, many = limits_of(self.limits, max_output, processes, self.vm.status.get("guest", ""))
        data = input.encode() if isinstance(input, str) else input
        with self.stream(*argv, env=env, cwd=cwd, user=user, processes=many) as program:
            result = program.collect(data, timeout, most)
        if check and result.status != 0:
            raise CorralError(f"{argv[0]} ended with status {result.status}", code="guest")
        return result

    @contextmanager
    def stream(
        self, *argv: str, env: Mapping[str, str] | None = None, cwd: str = "", user: str = "", tty: bool = False,
        processes: int | None = 0,
    ) -> Iterator[Exec]:  # fmt: skip
        """A program for the length of the block, to talk to while it runs: iterate over its output, ``write`` to it."""
        _, many = limits_of(self.limits, None, processes, self.vm.status.get("guest", ""))
        options: dict[str, Any] = {"env": dict(env or {}), "cwd": cwd, "user": user, "tty": tty, "processes": many}
        with (
            self._hold.explaining(),
            self.client.vms.exec(self.id, argv, **options) as program,
            self._hold.cutting(program.close),
        ):
            yield program

    def put(self, content: bytes | str, path: str) -> None:
        """Write a file in the guest."""
        self.run("sh", "-c", 'cat > "$1"', "put", path, input=content, check=True, processes=None)

    def get(self, path: str, *, max_output: int | str | None = "") -> bytes:
        """A file of the guest's. Raises Refused ``too-large`` for more than ``max_output`` bytes."""
        found = self.run("cat", "--", path, max_output=max_output, processes=None)
        if found.limit == "output":
            raise Refused(f"{path} is larger than was asked for", code="too-large", hint="ask for more: max_output")
        if found.status != 0:
            raise CorralError(found.stderr.decode(errors="replace").strip() or f"{path} cannot be read", code="guest")
        return found.stdout

    def copy_in(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a file or directory of this machine into the guest; into ``target`` if that is a directory."""
        from corral.client.sync.files import send

        with self._hold.explaining():
            send(self.client, Path(source), self.id, target, recursive=True, complain=refuse_entry, progress=_ignore)

    def copy_out(self, source: str, target: str | os.PathLike[str]) -> None:
        """Copy a file or directory out of the guest. What would land outside ``target`` is refused."""
        from corral.client.sync.files import fetch

        with self._hold.explaining():
            fetch(
                self.client, self.id, source, Path(target), recursive=True, complain=refuse_entry, progress=_ignore
            )  # fmt: skip


@contextmanager
def sandbox(
    image: str, *, client: Client | None = None, name: str | None = None, labels: Mapping[str, str] | None = None,
    timeout: float = 120.0, max_output: int | str | None = MAX_OUTPUT, processes: int | None = MAX_PROCESSES,
    net: str = "none", cpus: int | None = None, memory: int | str | None = None, disk: int | str | None = None,
    flavor: str | None = None, spec: Mapping[str, Any] | None = None,
) -> Iterator[Sandbox]:  # fmt: skip
    """A VM for the length of the block, deleted whatever happens, this process being killed included.

    Args:
        image: built or fetched first, if it is one that Corral knows how to get.
        timeout: longest time until the guest answers, seconds.
        max_output, processes: limits of each program (:class:`Limits`); None for none.
        net: ``none``, or a network: ``user`` reaches everything that this machine reaches.
        cpus, memory, disk, flavor, spec: as of ``client.vms.launch``.
    """
    from corral.client.sync import Client as Connection

    limits = Limits(None if max_output is None else parse_size(max_output), processes)
    own = client or Connection().__enter__()
    try:
        options = {"net": net, "cpus": cpus, "memory": memory, "disk": disk, "flavor": flavor, "spec": spec}
        with holding(own, begin(own, image, name=name, labels=labels, timeout=timeout, **options)) as hold:
            yield Sandbox(own, hold.wait_answer(timeout), hold, limits)
    finally:
        if client is None:
            own.close()


def begin(
    client: Client, image: str, *, name: str | None = None, labels: Mapping[str, str] | None = None,
    timeout: float = 120.0, **options: Any,
) -> Accepted:  # fmt: skip
    """Ask for a throw-away VM, and first for its image if that is not here yet.

    Options: those of :func:`corral.client.held.sandbox_spec`.
    """
    wanted = sandbox_spec(image, **options)

    def ask() -> Accepted:
        return client.vms.begin(wanted, name=name, labels=labels, timeout_s=timeout)

    try:
        return ask()
    except NotFound as error:
        if error.field != "spec.image" or not client.images.ensure(image):
            raise
        return ask()


@contextmanager
def holding(
    client: Client, begun: Accepted, *, keep: bool = False, told: Callable[[Held], None] | None = None
) -> Iterator[Hold]:
    """Hold a VM that was just begun, for the length of the block; then it is deleted (unless ``keep``)."""
    vm = begun.items[0]
    hold = Hold(client, vm, begun.tasks[0], told=told)
    try:
        yield hold
    finally:
        try:
            if not keep:
                discard(client, vm)
        finally:
            hold.close()


def discard(client: Client, vm: Record) -> None:
    """Have a VM deleted. Where that cannot be said, or its answer is lost, nobody holding it any more says the same."""
    with suppress(NotFound, Unavailable, Unknown):
        client.vms.delete(vm.id, force=True, wait=False, project=vm.project)


def _ignore(_count: int) -> None:
    """Progress that nobody watches."""
