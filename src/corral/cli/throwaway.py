"""One run: a VM for one program, from the request to its end. Who prints, and what becomes of errors: the callers.

The VM is ephemeral: the daemon deletes it when this process does not hold it any more, however it ended
(:mod:`corral.client.sync.hold`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from corral.cli import failures
from corral.cli.mount import Mount, Mounted
from corral.cli.progress import Moving, on_terminal, phrase
from corral.cli.session import Session
from corral.cli.timings import WAITING, Timings
from corral.client.held import MAX_PROCESSES
from corral.client.record import Accepted, Record
from corral.errors import CorralError, Refused
from corral.units import GIB

if TYPE_CHECKING:
    from corral.client import Client
    from corral.client.held import Held
    from corral.client.sync.hold import Hold
    from corral.client.sync.sockets import Exec

MAX_BACK = 4 * GIB
"""Bytes that come back from one guest at most: what it has is its own choice, and this machine's disk is not."""
USUAL = 0
"""As many processes as a program may have if nothing else is said."""


class Copy(NamedTuple):
    """A file or directory to be copied."""

    source: str
    target: str


class Plan(NamedTuple):
    """All that one run is told, but for what its program reads."""

    image: str
    argv: tuple[str, ...]
    vm: dict[str, Any] = {}
    """Options of :func:`corral.client.held.sandbox_spec`."""
    name: str | None = None
    keep: bool = False
    env: dict[str, str] = {}
    cwd: str = ""
    user: str = ""
    tty: bool = False
    interactive: bool = False
    start_timeout_s: float = 120.0
    timeout_s: float | None = None
    max_output: int | None = None
    processes: int | None = USUAL
    before: tuple[Copy, ...] = ()
    after: tuple[Copy, ...] = ()
    mounts: tuple[Mount, ...] = ()


class Throwaway:
    """A VM whose guest answers."""

    def __init__(self, client: Client, plan: Plan, vm: Record, hold: Hold) -> None:
        self._client, self._plan, self.vm, self._hold = client, plan, vm, hold
        self._mounted = [Mounted(client, vm.id, mount) for mount in plan.mounts]
        usual = MAX_PROCESSES if vm.status.get("guest") == "corral-guest" else None
        self.processes = usual if plan.processes == USUAL else plan.processes
        """How many the program may have; only corral-guest can say how many it has."""

    @contextmanager
    def program(self, rows: int = 24, columns: int = 80) -> Iterator[Exec]:
        """The plan's program, for the length of the block. Errors say what became of the VM, where that is known."""
        plan = self._plan
        options: dict[str, Any] = {
            "env": plan.env,
            "cwd": plan.cwd,
            "user": plan.user,
            "tty": plan.tty,
            "processes": self.processes,
        }
        with (
            self._hold.explaining(),
            self._client.vms.exec(self.vm.id, plan.argv, rows=rows, columns=columns, **options) as program,
            self._hold.cutting(program.close),
        ):
            yield program

    def copy_in(self) -> None:
        """What the plan asks for before the program runs. Raises CorralError."""
        from corral.client.held import refuse_entry
        from corral.client.sync.files import send

        with self._hold.explaining():
            for mounted in self._mounted:
                mounted.enter()
            for source, target in self._plan.before:
                send(
                    self._client, Path(source), self.vm.id, target, recursive=True, complain=refuse_entry,
                    progress=lambda _count: None,
                )  # fmt: skip

    def copy_out(self) -> None:
        """What the plan asks for afterwards, however the program ended. Raises CorralError."""
        if not self._plan.after and not self._mounted:
            return
        from corral.cli.mount import bounded
        from corral.client.held import refuse_entry
        from corral.client.sync.files import fetch

        limit, kept = bounded(MAX_BACK), 0

        def complain(name: str, why: str) -> None:
            nonlocal kept
            kept += 1
            failures.line(f"error: {name}: {why}")

        with self._hold.explaining():
            for mounted in self._mounted:
                mounted.leave(complain, limit)
            for source, target in self._plan.after:
                fetch(
                    self._client, self.vm.id, source, Path(target), into=target.endswith("/"), recursive=True,
                    complain=refuse_entry, progress=limit,
                )  # fmt: skip
        if kept:
            raise CorralError(f"{kept} changes of the guest's were not carried over")


@contextmanager
def throwaway(
    session: Session, client: Client, plan: Plan, timings: Timings, *,
    begun: Callable[[Record], None] | None = None, quiet: bool = False,
) -> Iterator[Throwaway]:  # fmt: skip
    """A VM for the length of the block. Raises what kept it from running.

    ``begun`` is told of it as soon as there is one. ``quiet``: show no progress on a terminal.
    """
    from corral.client.sync.sandbox import holding

    asked = _begin(session, client, plan)
    timings.mark("the request")
    with _starting(quiet) as told, holding(client, asked, keep=plan.keep, told=told.show) as hold:
        if begun is not None:
            begun(asked.items[0])
        import corral.client.sync.sockets  # noqa: F401 - while the guest boots, rather than after

        try:
            vm = hold.wait_answer(plan.start_timeout_s)
            told.close()
            timings.mark(WAITING)
            timings.inside(hold.held.launch)
            yield Throwaway(client, plan, vm, hold)
        finally:
            if plan.keep and not hold.held.deleted:
                told.close()
                _name(hold.held)
    if not plan.keep:
        timings.mark("having the VM deleted")


def _name(held: Held) -> None:
    """Say which VM stays, whatever became of its program."""
    name = failures.clean(held.vm.name)
    use = f"corral exec {name} -- sh" if held.answers else f"corral info {name}"
    failures.line(f"kept: {name} ({use}; corral delete --force {name})")


def _begin(session: Session, client: Client, plan: Plan) -> Accepted:
    """Ask for the VM; if its image is not here yet, have that first."""
    from corral.client.held import sandbox_spec

    spec = sandbox_spec(plan.image, ephemeral=not plan.keep, **plan.vm)

    def ask() -> Accepted:
        return client.vms.begin(spec, name=plan.name, timeout_s=plan.start_timeout_s)

    try:
        return ask()
    except Refused as error:
        if error.field != "spec.image":
            raise
        from corral.cli.obtain import ensure_image

        ensure_image(session, plan.image)
        return ask()


class _Starting:
    """The moving line on a terminal until the guest answers."""

    def __init__(self, moving: Moving | None) -> None:
        self._moving = moving

    def show(self, held: Held) -> None:
        steps = [step for step in held.launch.status.get("steps", []) if step["state"] != "pending"]
        if self._moving is not None and steps:
            self._moving.text = f"{failures.clean(held.vm.name)}: {phrase(steps[-1])}"

    def close(self) -> None:
        if self._moving is not None:
            self._moving.close()


@contextmanager
def _starting(quiet: bool) -> Iterator[_Starting]:
    shown = _Starting(Moving() if on_terminal() and not quiet else None)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception, so that its VM is deleted at once. While the program runs they
    are the program's."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {
        number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
