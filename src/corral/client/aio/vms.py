"""VMs, for asyncio; the twin of :mod:`corral.client.sync.vms`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from corral.client import calls, frames
from corral.client.aio.resources import Progress, Resource
from corral.client.record import Accepted, Record, Result, vm_spec
from corral.errors import CorralError, NotFound

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient
    from corral.client.aio.sockets import AsyncConsole, AsyncExec


class AsyncVm(Record):
    """A VM as it was when it was read, that can be told what to do."""

    client: AsyncClient

    async def run(self, *argv: str, input: bytes | str = b"", timeout: float | None = None, **options: Any) -> Result:
        """Run a program in the guest; its status and what it printed. Options: env, cwd, user, check."""
        return await self.client.vms.run(self.id, *argv, input=input, timeout=timeout, **options)

    async def refresh(self) -> AsyncVm:
        """The VM as it is now."""
        return await self.client.vms.get(self.id)

    async def stop(self, *, force: bool = False) -> None:
        await self.client.vms.stop(self.id, force=force)

    async def start(self) -> None:
        await self.client.vms.start(self.id)

    async def delete(self, *, force: bool = False) -> None:
        await self.client.vms.delete(self.id, force=force)


class Vms(Resource):
    """Verbs on VMs. Those that take time return when they are done; ``wait=False`` gives the task instead."""

    def _record(self, item: dict[str, Any]) -> AsyncVm:
        vm = AsyncVm(item)
        vm.client = self._client
        return vm

    async def get(self, ref: str, *, project: str | None = None) -> AsyncVm:
        return cast(AsyncVm, await super().get(ref, project=project))

    async def begin(
        self, spec: Mapping[str, Any], *, name: str | None = None, project: str | None = None,
        labels: Mapping[str, str] | None = None, count: int | None = None, timeout_s: float | None = None,
        dry_run: bool = False, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """Ask for VMs and return at once, with a launch task for each. ``dry_run``: nothing is written."""
        call = calls.create(
            "vms", spec, name=name, project=project or self._client.project, labels=labels, count=count,
            timeout_s=timeout_s, dry_run=dry_run, key=key,
        )  # fmt: skip
        return self._accepted(await self._client.http.send(call))

    async def begin_launch(
        self, image: str, *, cpus: int | None = None, memory: int | str | None = None, disk: int | str | None = None,
        flavor: str | None = None, spec: Mapping[str, Any] | None = None, **options: Any,
    ) -> Accepted:  # fmt: skip
        """:meth:`begin` with the words of :meth:`launch`."""
        wanted = vm_spec(image, cpus=cpus, memory=memory, disk=disk, flavor=flavor, spec=spec)
        return await self.begin(wanted, **options)

    async def launch(
        self, image: str, *, name: str | None = None, timeout: float = 120.0, on_change: Progress | None = None,
        **options: Any,
    ) -> AsyncVm:  # fmt: skip
        """A VM whose guest answers.

        Options: cpus, memory and disk (bytes or like ``"512M"``), flavor, spec (anything else), project, labels.
        Raises TimedOut naming the step it waited for; the VM goes on booting.
        """
        begun = await self.begin_launch(image, name=name, timeout_s=timeout, **options)
        return await self.finish_launch(begun, on_change=on_change)

    async def finish_launch(self, begun: Accepted, *, on_change: Progress | None = None) -> AsyncVm:
        """Wait for the first of what was begun."""
        await self._client.tasks.wait(begun.tasks[0].id, on_change=on_change)
        return await self.get(begun.items[0].id)

    async def power(
        self, verb: str, ref: str, *, force: bool = False, timeout_s: float | None = None, wait: bool = True,
        project: str | None = None, on_change: Progress | None = None, key: str | None = None,
    ) -> Record:  # fmt: skip
        """start, stop, restart, reset, pause or resume. Returns the task, finished unless ``wait=False``."""
        scope = project or self._client.project
        answer = await self._client.http.send(calls.power(verb, ref, scope, force=force, timeout_s=timeout_s, key=key))
        return await self._task(answer, wait, on_change)

    async def start(self, ref: str, **options: Any) -> Record:
        return await self.power("start", ref, **options)

    async def stop(self, ref: str, *, force: bool = False, **options: Any) -> Record:
        """Ask the guest to power off; ``force`` cuts the power."""
        return await self.power("stop", ref, force=force, **options)

    async def restart(self, ref: str, *, force: bool = False, **options: Any) -> Record:
        return await self.power("restart", ref, force=force, **options)

    async def reset(self, ref: str, **options: Any) -> Record:
        return await self.power("reset", ref, **options)

    async def pause(self, ref: str, **options: Any) -> Record:
        return await self.power("pause", ref, **options)

    async def resume(self, ref: str, **options: Any) -> Record:
        return await self.power("resume", ref, **options)

    async def delete(  # type: ignore[override]  # a VM is gone only after a while: unlike others, this gives the task
        self, ref: str, *, force: bool = False, wait: bool = True, project: str | None = None,
        on_change: Progress | None = None,
    ) -> Record:  # fmt: skip
        """Delete the VM and its disk. A running one is refused without ``force``."""
        answer = await self._client.http.send(calls.delete("vms", ref, project or self._client.project, force=force))
        return await self._task(answer, wait, on_change)

    async def begin_fork(
        self, ref: str, *, name: str | None = None, count: int | None = None, labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None, project: str | None = None, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """Ask for forks of a running VM, with its memory and disk as they are now; a task for each."""
        scope = project or self._client.project
        call = calls.fork(ref, scope, name=name, labels=labels, count=count, timeout_s=timeout_s, key=key)
        return self._accepted(await self._client.http.send(call))

    async def fork(self, ref: str, *, on_change: Progress | None = None, **options: Any) -> AsyncVm:
        """A fork of a running VM, whose guest answers. Options: name, labels, timeout_s, project."""
        begun = await self.begin_fork(ref, **options)
        return await self.finish_launch(begun, on_change=on_change)

    async def wait(
        self, ref: str, phase: str = "running", *, timeout: float | None = None, project: str | None = None,
        on_change: Progress | None = None,
    ) -> AsyncVm:  # fmt: skip
        """The VM when it is in ``phase``. Raises CorralError when it is in ``error`` instead, TimedOut, NotFound."""
        async for vm in self._client.follow("vm", await self.get(ref, project=project), timeout):
            if on_change is not None:
                on_change(vm)
            if vm.phase == phase:
                return self._record(vm)
            if vm.phase == "error":
                raise CorralError(f"{vm.name} is in phase error: {vm.status.get('reason', '')}")
        raise NotFound(f"VM {ref} was deleted while it was waited for")

    async def log(self, ref: str, *, tail: int = 64 << 10, project: str | None = None) -> bytes:
        """The end of the serial log."""
        return await self._client.http.send(calls.of_vm("log", ref, project or self._client.project, tail=tail)) or b""

    async def follow_log(self, ref: str, *, tail: int = 64 << 10, project: str | None = None) -> AsyncIterator[bytes]:
        """The end of the serial log, then whatever comes."""
        call = calls.of_vm("log", ref, project or self._client.project, tail=tail, follow=True)
        async with self._client.http.stream(call) as pieces:
            async for piece in pieces:
                yield piece

    async def explain(self, ref: str, *, project: str | None = None) -> dict[str, Any]:
        """Why it is slow (``findings``, each with code, effect, message and hint), and where it fits (``hosts``)."""
        return dict(await self._client.http.send(calls.of_vm("explain", ref, project or self._client.project)))

    async def guest(self, ref: str, *, project: str | None = None) -> dict[str, Any]:
        """What the guest says about itself."""
        return dict(await self._client.http.send(calls.of_vm("guest", ref, project or self._client.project)))

    @asynccontextmanager
    async def exec(
        self, ref: str, argv: tuple[str, ...], *, project: str | None = None, **options: Any
    ) -> AsyncIterator[AsyncExec]:
        """A program, for the length of the block. Options: env, cwd, user, tty, rows, columns."""
        from corral.client.aio.sockets import AsyncExec

        http = self._client.http
        call = calls.of_vm("exec", ref, project or self._client.project)
        command = frames.command(argv, **options)
        program = await AsyncExec.open(http.address, call, command, token=http.token, timeout=http.timeout)
        try:
            yield program
        finally:
            await program.close()

    async def run(
        self, ref: str, *argv: str, input: bytes | str = b"", timeout: float | None = None,
        max_output: int | None = None, project: str | None = None, check: bool = False, **options: Any,
    ) -> Result:  # fmt: skip
        """Run a program to its end. ``check``: raise CorralError ``guest`` for a status other than 0.

        ``timeout``: seconds, then it is killed and TimedOut raised. ``max_output``: bytes that it may print, then it is
        killed and the result says so.
        """
        async with self.exec(ref, argv, project=project, **options) as program:
            result = await program.collect(input.encode() if isinstance(input, str) else input, timeout, max_output)
        if check and result.status != 0:
            raise CorralError(f"{argv[0]} ended with status {result.status}", code="guest")
        return result

    @asynccontextmanager
    async def console(self, ref: str, *, project: str | None = None) -> AsyncIterator[AsyncConsole]:
        """The serial console, for the length of the block."""
        from corral.client.aio.sockets import AsyncConsole

        http = self._client.http
        call = calls.of_vm("console", ref, project or self._client.project)
        line = await AsyncConsole.open(http.address, call, token=http.token, timeout=http.timeout)
        try:
            yield line
        finally:
            await line.close()

    async def _task(self, answer: dict[str, Any], wait: bool, on_change: Progress | None) -> Record:
        task = Record(answer["task"])
        return await self._client.tasks.wait(task.id, on_change=on_change) if wait else task
