"""VMs, for synchronous callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from corral.client import calls, frames
from corral.client.record import Accepted, Record, Result, vm_spec
from corral.client.sync.resources import Progress, Resource
from corral.errors import CorralError, NotFound

if TYPE_CHECKING:
    from corral.client.sync import Client
    from corral.client.sync.sockets import Console, Exec


class Vm(Record):
    """A VM as it was when it was read, that can be told what to do."""

    client: Client

    def run(self, *argv: str, input: bytes | str = b"", timeout: float | None = None, **options: Any) -> Result:
        """Run a program in the guest; its status and what it printed. Options: env, cwd, user."""
        return self.client.vms.run(self.id, *argv, input=input, timeout=timeout, **options)

    def refresh(self) -> Vm:
        """The VM as it is now."""
        return self.client.vms.get(self.id)

    def stop(self, *, force: bool = False) -> None:
        self.client.vms.stop(self.id, force=force)

    def start(self) -> None:
        self.client.vms.start(self.id)

    def delete(self, *, force: bool = False) -> None:
        self.client.vms.delete(self.id, force=force)


class Vms(Resource):
    """Verbs on VMs. Those that take time return when they are done; ``wait=False`` gives the task instead."""

    record = Vm

    def _record(self, item: dict[str, Any]) -> Vm:
        vm = Vm(item)
        vm.client = self._client
        return vm

    def get(self, ref: str, *, project: str | None = None) -> Vm:
        return cast(Vm, super().get(ref, project=project))

    def begin(
        self, spec: Mapping[str, Any], *, name: str | None = None, project: str | None = None,
        labels: Mapping[str, str] | None = None, count: int | None = None, timeout_s: float | None = None,
        dry_run: bool = False, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """Ask for VMs and return at once, with a launch task for each. ``dry_run``: nothing is written."""
        call = calls.create(
            "vms", spec, name=name, project=project or self._client.project, labels=labels, count=count,
            timeout_s=timeout_s, dry_run=dry_run, key=key,
        )  # fmt: skip
        return self._accepted(self._client.http.send(call))

    def begin_launch(
        self, image: str, *, cpus: int | None = None, memory: int | str | None = None, disk: int | str | None = None,
        flavor: str | None = None, spec: Mapping[str, Any] | None = None, **options: Any,
    ) -> Accepted:  # fmt: skip
        """:meth:`begin` with the words of :meth:`launch`."""
        return self.begin(vm_spec(image, cpus=cpus, memory=memory, disk=disk, flavor=flavor, spec=spec), **options)

    def launch(
        self, image: str, *, name: str | None = None, timeout: float = 120.0, on_change: Progress | None = None,
        **options: Any,
    ) -> Vm:  # fmt: skip
        """A VM whose guest answers.

        Options: cpus, memory and disk (bytes or like ``"512M"``), flavor, spec (anything else), project, labels.
        Raises TimedOut naming the step it waited for; the VM goes on booting.
        """
        begun = self.begin_launch(image, name=name, timeout_s=timeout, **options)
        return self.finish_launch(begun, on_change=on_change)

    def finish_launch(self, begun: Accepted, *, on_change: Progress | None = None) -> Vm:
        """Wait for the first of what was begun."""
        self._client.tasks.wait(begun.tasks[0].id, on_change=on_change)
        return self.get(begun.items[0].id)

    def power(
        self, verb: str, ref: str, *, force: bool = False, timeout_s: float | None = None, wait: bool = True,
        project: str | None = None, on_change: Progress | None = None, key: str | None = None,
    ) -> Record:  # fmt: skip
        """start, stop, restart, reset, pause or resume. Returns the task, finished unless ``wait=False``."""
        scope = project or self._client.project
        answer = self._client.http.send(calls.power(verb, ref, scope, force=force, timeout_s=timeout_s, key=key))
        return self._task(answer, wait, on_change)

    def start(self, ref: str, **options: Any) -> Record:
        return self.power("start", ref, **options)

    def stop(self, ref: str, *, force: bool = False, **options: Any) -> Record:
        """Ask the guest to power off; ``force`` cuts the power."""
        return self.power("stop", ref, force=force, **options)

    def restart(self, ref: str, *, force: bool = False, **options: Any) -> Record:
        return self.power("restart", ref, force=force, **options)

    def reset(self, ref: str, **options: Any) -> Record:
        return self.power("reset", ref, **options)

    def pause(self, ref: str, **options: Any) -> Record:
        return self.power("pause", ref, **options)

    def resume(self, ref: str, **options: Any) -> Record:
        return self.power("resume", ref, **options)

    def delete(  # type: ignore[override]  # a VM is gone only after a while: unlike others, this gives the task
        self, ref: str, *, force: bool = False, wait: bool = True, project: str | None = None,
        on_change: Progress | None = None,
    ) -> Record:  # fmt: skip
        """Delete the VM and its disk. A running one is refused without ``force``."""
        answer = self._client.http.send(calls.delete("vms", ref, project or self._client.project, force=force))
        return self._task(answer, wait, on_change)

    def begin_fork(
        self, ref: str, *, name: str | None = None, count: int | None = None, labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None, project: str | None = None, key: str | None = None,
    ) -> Accepted:  # fmt: skip
        """Ask for forks of a running VM, with its memory and disk as they are now; a task for each."""
        scope = project or self._client.project
        call = calls.fork(ref, scope, name=name, labels=labels, count=count, timeout_s=timeout_s, key=key)
        return self._accepted(self._client.http.send(call))

    def fork(self, ref: str, *, on_change: Progress | None = None, **options: Any) -> Vm:
        """A fork of a running VM, whose guest answers. Options: name, labels, timeout_s, project."""
        begun = self.begin_fork(ref, **options)
        return self.finish_launch(begun, on_change=on_change)

    def wait(
        self, ref: str, phase: str = "running", *, timeout: float | None = None, project: str | None = None,
        on_change: Callable[[Record], None] | None = None,
    ) -> Vm:  # fmt: skip
        """The VM when it is in ``phase``. Raises Refused when it is in ``error`` instead, TimedOut, NotFound."""
        for vm in self._client.follow("vm", self.get(ref, project=project), timeout):
            if on_change is not None:
                on_change(vm)
            if vm.phase == phase:
                return self._record(vm)
            if vm.phase == "error":
                raise CorralError(f"{vm.name} is in phase error: {vm.status.get('reason', '')}")
        raise NotFound(f"VM {ref} was deleted while it was waited for")

    def log(self, ref: str, *, tail: int = 64 << 10, project: str | None = None) -> bytes:
        """The end of the serial log."""
        return self._client.http.send(calls.of_vm("log", ref, project or self._client.project, tail=tail)) or b""

    def follow_log(self, ref: str, *, tail: int = 64 << 10, project: str | None = None) -> Iterator[bytes]:
        """The end of the serial log, then whatever comes."""
        call = calls.of_vm("log", ref, project or self._client.project, tail=tail, follow=True)
        with self._client.http.stream(call) as stream:
            while data := stream.read():
                yield data

    def explain(self, ref: str, *, project: str | None = None) -> dict[str, Any]:
        """Why it is slow (``findings``, each with code, effect, message and hint), and where it fits (``hosts``)."""
        return dict(self._client.http.send(calls.of_vm("explain", ref, project or self._client.project)))

    def guest(self, ref: str, *, project: str | None = None) -> dict[str, Any]:
        """What the guest says about itself."""
        return dict(self._client.http.send(calls.of_vm("guest", ref, project or self._client.project)))

    def exec(self, ref: str, argv: tuple[str, ...], *, project: str | None = None, **options: Any) -> Exec:
        """Start a program. Options: env, cwd, user, tty, rows, columns. Close what is returned."""
        from corral.client.sync.sockets import Exec

        call = calls.of_vm("exec", ref, project or self._client.project)
        http = self._client.http
        return Exec(http.address, call, frames.command(argv, **options), token=http.token, timeout=http.timeout)

    def run(
        self, ref: str, *argv: str, input: bytes | str = b"", timeout: float | None = None,
        max_output: int | None = None, project: str | None = None, check: bool = False, **options: Any,
    ) -> Result:  # fmt: skip
        """Run a program to its end. ``check``: raise CorralError ``guest`` for a status other than 0.

        ``timeout``: seconds, then it is killed and TimedOut raised. ``max_output``: bytes that it may print, then it is
        killed and the result says so.
        """
        with self.exec(ref, argv, project=project, **options) as program:
            result = program.collect(input.encode() if isinstance(input, str) else input, timeout, max_output)
        if check and result.status != 0:
            raise CorralError(f"{argv[0]} ended with status {result.status}", code="guest")
        return result

    def console(self, ref: str, *, project: str | None = None) -> Console:
        """The serial console. Close what is returned."""
        from corral.client.sync.sockets import Console

        http = self._client.http
        call = calls.of_vm("console", ref, project or self._client.project)
        return Console(http.address, call, token=http.token, timeout=http.timeout)

    def _task(self, answer: dict[str, Any], wait: bool, on_change: Progress | None) -> Record:
        task = Record(answer["task"])
        return self._client.tasks.wait(task.id, on_change=on_change) if wait else task
