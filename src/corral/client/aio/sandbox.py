"""A throw-away VM, for asyncio; the twin of :mod:`corral.client.sync.sandbox`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.client.aio.hold import AsyncHold
from corral.client.held import MAX_OUTPUT, MAX_PROCESSES, Limits, limits_of, refuse_entry, sandbox_spec
from corral.client.record import Accepted, Record, Result
from corral.errors import CorralError, NotFound, Refused, Unavailable, Unknown
from corral.units import parse_size

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient
    from corral.client.aio.sockets import AsyncExec
    from corral.client.sync import Client


class AsyncSandbox:
    """A VM whose guest answers, and which is gone after its block. Made by :func:`sandbox`."""

    def __init__(self, client: AsyncClient, vm: Record, hold: AsyncHold, limits: Limits) -> None:
        self.client, self.vm, self.limits = client, vm, limits
        self._hold = hold

    @property
    def id(self) -> str:
        return self.vm.id

    @property
    def name(self) -> str:
        return self.vm.name

    async def run(
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
        async with self.stream(*argv, env=env, cwd=cwd, user=user, processes=many) as program:
            result = await program.collect(data, timeout, most)
        if check and result.status != 0:
            raise CorralError(f"{argv[0]} ended with status {result.status}", code="guest")
        return result

    @asynccontextmanager
    async def stream(
        self, *argv: str, env: Mapping[str, str] | None = None, cwd: str = "", user: str = "", tty: bool = False,
        processes: int | None = 0,
    ) -> AsyncIterator[AsyncExec]:  # fmt: skip
        """A program for the length of the block, to talk to while it runs: iterate over its output, ``write`` to it."""
        _, many = limits_of(self.limits, None, processes, self.vm.status.get("guest", ""))
        options: dict[str, Any] = {"env": dict(env or {}), "cwd": cwd, "user": user, "tty": tty, "processes": many}
        async with (
            self._hold.explaining(),
            self.client.vms.exec(self.id, argv, **options) as program,
            self._hold.cutting(program.close),
        ):
            yield program

    async def put(self, content: bytes | str, path: str) -> None:
        """Write a file in the guest."""
        await self.run("sh", "-c", 'cat > "$1"', "put", path, input=content, check=True, processes=None)

    async def get(self, path: str, *, max_output: int | str | None = "") -> bytes:
        """A file of the guest's. Raises Refused ``too-large`` for more than ``max_output`` bytes."""
        found = await self.run("cat", "--", path, max_output=max_output, processes=None)
        if found.limit == "output":
            raise Refused(f"{path} is larger than was asked for", code="too-large", hint="ask for more: max_output")
        if found.status != 0:
            raise CorralError(found.stderr.decode(errors="replace").strip() or f"{path} cannot be read", code="guest")
        return found.stdout

    async def copy_in(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a file or directory of this machine into the guest; into ``target`` if that is a directory."""
        from corral.client.sync.files import send

        await self._in_thread(
            lambda client: send(
                client, Path(source), self.id, target, recursive=True, complain=refuse_entry, progress=_ignore
            )
        )  # fmt: skip

    async def copy_out(self, source: str, target: str | os.PathLike[str]) -> None:
        """Copy a file or directory out of the guest. What would land outside ``target`` is refused."""
        from corral.client.sync.files import fetch

        await self._in_thread(
            lambda client: fetch(
                client, self.id, source, Path(target), recursive=True, complain=refuse_entry, progress=_ignore
            )
        )  # fmt: skip

    async def _in_thread(self, work: Callable[[Client], None]) -> None:
        """Packing and unpacking read and write files: done by the synchronous client, in a thread."""
        from corral.client.sync import Client

        http = self.client.http

        def work_there() -> None:
            client = Client(http.address.text, token=http.token, project=self.client.project, timeout=http.timeout)
            try:
                work(client)
            finally:
                client.close()

        async with self._hold.explaining():
            await asyncio.to_thread(work_there)


@asynccontextmanager
async def sandbox(
    image: str, *, client: AsyncClient | None = None, name: str | None = None,
    labels: Mapping[str, str] | None = None, timeout: float = 120.0, max_output: int | str | None = MAX_OUTPUT,
    processes: int | None = MAX_PROCESSES, net: str = "none", cpus: int | None = None,
    memory: int | str | None = None, disk: int | str | None = None, flavor: str | None = None,
    spec: Mapping[str, Any] | None = None,
) -> AsyncIterator[AsyncSandbox]:  # fmt: skip
    """A VM for the length of the block, deleted whatever happens, this process being killed included.

    Args:
        image: built or fetched first, if it is one that Corral knows how to get.
        timeout: longest time until the guest answers, seconds.
        max_output, processes: limits of each program (:class:`~corral.client.held.Limits`); None for none.
        net: ``none``, or a network: ``user`` reaches everything that this machine reaches.
        cpus, memory, disk, flavor, spec: as of ``client.vms.launch``.
    """
    from corral.client.aio import AsyncClient as Connection

    limits = Limits(None if max_output is None else parse_size(max_output), processes)
    own = client or await Connection().__aenter__()
    try:
        options = {"net": net, "cpus": cpus, "memory": memory, "disk": disk, "flavor": flavor, "spec": spec}
        begun = await _begin(own, sandbox_spec(image, **options), name, labels, timeout)  # type: ignore[arg-type]
        hold = AsyncHold(own, begun.items[0], begun.tasks[0])
        try:
            yield AsyncSandbox(own, await hold.wait_answer(timeout), hold, limits)
        finally:
            try:
                await _discard(own, begun.items[0])
            finally:
                await hold.close()
    finally:
        if client is None:
            await own.close()


async def _begin(
    client: AsyncClient, spec: Mapping[str, Any], name: str | None, labels: Mapping[str, str] | None, timeout: float
) -> Accepted:
    """Ask for a throw-away VM, and first for its image if that is not here yet."""
    try:
        return await client.vms.begin(spec, name=name, labels=labels, timeout_s=timeout)
    except NotFound as error:
        if error.field != "spec.image" or not await client.images.ensure(spec["image"]):
            raise
    return await client.vms.begin(spec, name=name, labels=labels, timeout_s=timeout)


async def _discard(client: AsyncClient, vm: Record) -> None:
    """Have a VM deleted. Where that cannot be said, or its answer is lost, nobody holding it any more says the same."""
    with suppress(NotFound, Unavailable, Unknown):
        await client.vms.delete(vm.id, force=True, wait=False, project=vm.project)


def _ignore(_count: int) -> None:
    """Progress that nobody watches."""
