"""One machine: its process (started here or taken over), its QMP link, its end.

The process is only ever signalled through a pidfd whose start time was compared, and its end is seen by the event
loop on that pidfd: no polling. A link is made when it is needed and made again when it was lost.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable
from typing import Any

import msgspec
import structlog

from corral.engine.protocol import EngineEvent, HostForward, Machine, Sighting, State
from corral.engine.qemu.qmp import Link, Verb
from corral.engine.qemu.record import Record, RunDir, ended
from corral.errors import Refused, Unavailable
from corral.runtime import Runtime, deadline, process
from corral.runtime.process import boot_id

log = structlog.get_logger("engine")
STATUS_DEADLINE = 2.0
COMMAND_DEADLINE = 5.0
_LOADING = 0.002
"""Seconds between looks at whether a fork's state is loaded, which takes about 20 ms."""
KILL_DEADLINE = 10.0
"""SIGKILL takes effect when the kernel is done with the process's present call; a hung disk can delay that."""

# QEMU's run states → ours. What is not here (suspended, watchdog …) has CPUs that stand still: paused.
_STATES = {
    "prelaunch": State.CREATED,
    "inmigrate": State.CREATED,
    "running": State.RUNNING,
    "shutdown": State.SHUTDOWN,
    "guest-panicked": State.PANICKED,
    "internal-error": State.PANICKED,
    "io-error": State.STALLED,
}
_EVENTS = {
    "STOP": "state",
    "RESUME": "state",
    "RESET": "reset",
    "SHUTDOWN": "shutdown",
    "GUEST_PANICKED": "panic",
    "BLOCK_IO_ERROR": "disk-error",
}
_DOING = {
    "R": "wants CPU time", "S": "sleeps", "D": "waits for a disk or the kernel", "T": "is stopped by a signal",
}  # fmt: skip
"""By its state in /proc."""


class QemuMachine:
    """A machine that has a process or left a trace of one. ``publish`` receives its events."""

    def __init__(self, run: RunDir, record: Record, rt: Runtime, publish: Callable[[EngineEvent], None]) -> None:
        self.run, self.record = run, record
        self._rt, self._publish = rt, publish
        self._pidfd: int | None = None
        self._link: Link | None = None
        self._linking = asyncio.Lock()
        self.gone = asyncio.Event()
        self.hold = False
        """It is made to stand still for a moment, which is nobody's business: it is shown as running."""

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def alive(self) -> bool:
        """Its process is there."""
        return self._pidfd is not None

    @property
    def pidfd(self) -> int:
        """Its process. It must be alive."""
        assert self._pidfd is not None, f"machine {self.id} has ended"
        return self._pidfd

    def watch(self) -> bool:
        """Take hold of the process that the record names; False when that one is gone."""
        assert self._pidfd is None, "watched twice"
        record = self.record
        if record.pid is None or record.start is None or record.boot_id != boot_id():
            return False
        self._pidfd = process.open_pidfd(record.pid, record.start)
        if self._pidfd is None:
            return False
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
        return not self._has_ended()

    def _has_ended(self) -> bool:
        """Notice an end that the event loop has not told of yet."""
        if self._pidfd is not None and _readable(self._pidfd):
            self._ended()
        return not self.alive

    def bury(self, code: int | None = None, signal: int | None = None, *, known: bool = False) -> None:
        """Write down how it ended, once."""
        if self.record.exit is None:
            rebooted = self.record.boot_id != boot_id()
            self.save(exit=ended(self.run, self.record, code, signal, known=known, rebooted=rebooted))
        self.gone.set()

    def save(self, **changes: Any) -> None:
        """Change the record, in memory and on disk (a machine whose directory was deleted has none).

        A disk that takes no more keeps nobody from ending a machine: what is not written is seen from its process.
        """
        self.record = msgspec.structs.replace(self.record, **changes)
        if self.run.path.exists():
            try:
                self.run.write(self.record)
            except OSError as error:
                log.warning("the record of a machine cannot be written", vm=self.id, error=str(error))

    def _ended(self) -> None:
        """The event loop's call when the process has ended."""
        assert self._pidfd is not None
        code, number, known = _reap(self._pidfd)
        self._release()
        self.bury(code, number, known=known)
        assert self.record.exit is not None
        self._publish(EngineEvent(self.id, "exited", self.record.exit.reason))

    def _release(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    async def close(self) -> None:
        """Let go of it; it goes on running."""
        self._release()
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def call(self, verb: Verb, arguments: dict[str, object] | None = None, *, timeout: float) -> Any:
        """Say ``verb`` over the link, which is made if there is none. ``timeout`` bounds both, seconds."""
        try:
            async with deadline(timeout, f"QEMU's answer to {verb.value}"):
                async with self._linking:
                    if self._link is None or not self._link.up:
                        if self._link is not None:
                            await self._link.close()
                            self._link = None
                        self._link = await Link.open(self.id, self.run.socket("qmp"), self._on_event, timeout)
                    link = self._link
                return await link.call(verb, arguments, timeout=timeout)
        except Unavailable as error:
            raise Unavailable(error.message, code="unresponsive") from error

    async def command(
        self, verb: Verb, arguments: dict[str, object] | None = None, *, timeout: float = COMMAND_DEADLINE
    ) -> Any:
        """Say ``verb`` to a machine that must be alive (else Refused ``wrong-phase``); returns its answer."""
        if not self.alive:
            raise Refused(f"machine {self.id} does not run", code="wrong-phase")
        return await self.call(verb, arguments, timeout=timeout)

    async def loaded(self, timeout: float) -> None:
        """Wait until it answers and, if it is a fork, has its state. ``timeout`` bounds it, seconds."""
        try:
            async with deadline(timeout, "QEMU's start"):
                while (await self.call(Verb.STATUS, timeout=timeout))["status"] == "inmigrate":
                    await self._rt.clock.sleep(_LOADING)
        except Unavailable as error:
            raise Unavailable(error.message, code="unresponsive") from error

    def doing(self) -> str:
        """What its process does at this moment, for people."""
        now = process.stat(self.record.pid) if self.record.pid is not None else None
        return _DOING.get(now.state, f"is in state {now.state}") if now is not None else "is gone"

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        kind, message = _EVENTS[name], str(data.get("reason") or data.get("action") or name.lower())
        if name == "BLOCK_IO_ERROR":
            kind = kind if data.get("action") == "report" else "disk-full"
            message = f"{data.get('operation')} of {data.get('node-name')}: {message}"
        self._publish(EngineEvent(self.id, kind, message[:200]))

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._pidfd is None:
            return
        self.save(asked=True)
        process.send(self._pidfd, signal.SIGKILL)
        try:
            async with deadline(KILL_DEADLINE, f"the end of machine {self.id}"):
                await self.gone.wait()
        except Unavailable as error:
            raise Unavailable(error.message, code="unresponsive", hint="its disk may hang") from error

    async def sight(self) -> Sighting:
        """What is seen of it now, within 2 s; a silent one is ``unresponsive``."""
        if not self.alive:
            return self._sighting(State.EXITED)
        self.run.bound_log()
        assert self.record.pid is not None
        now = process.stat(self.record.pid)
        if now is not None and now.state == "T":  # stopped by a signal: it will not answer, so do not wait
            return self._sighting(State.UNRESPONSIVE)
        try:
            answer = await self.call(Verb.STATUS, timeout=STATUS_DEADLINE)
            state = self._state(str(answer["status"]))
            fault = await self._fault() if state is State.STALLED else ""
        except Unavailable:
            state, fault = State.UNRESPONSIVE, ""
        return self._sighting(State.EXITED if self._has_ended() else state, fault)

    async def _fault(self) -> str:
        """Why it stands still: QEMU keeps it beside each disk until it goes on."""
        disks = await self.call(Verb.DISKS, timeout=STATUS_DEADLINE)
        return "disk-full" if any(disk.get("io-status") == "nospace" for disk in disks) else "disk-error"

    def _state(self, status: str) -> State:
        state = _STATES.get(status, State.PAUSED)
        if state is State.PAUSED and self.record.fresh:
            return State.CREATED
        if state is State.PAUSED and self.hold:
            return State.RUNNING
        return state

    def _sighting(self, state: State, fault: str = "") -> Sighting:
        record = self.record
        forwards = forwards_of(record.machine)
        if state is State.EXITED:
            return Sighting(
                id=self.id, state=state, epoch=record.machine.epoch, accelerator=record.accelerator, exit=record.exit,
                started_at=record.started_at, memory=record.machine.memory, forwards=forwards,
            )  # fmt: skip
        return Sighting(
            id=self.id, state=state, pid=record.pid, started_at=record.started_at, epoch=record.machine.epoch,
            accelerator=record.accelerator, memory=record.machine.memory, forwards=forwards, fault=fault,
            template=record.machine.template,
        )  # fmt: skip


def forwards_of(machine: Machine) -> tuple[HostForward, ...]:
    return tuple(forward for card in machine.cards for forward in card.forwards)


def _reap(pidfd: int) -> tuple[int | None, int | None, bool]:
    """Exit code or signal of the process if it is our child, and whether it is."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None, None, False
    if result is None:
        return None, None, False
    if result.si_code == os.CLD_EXITED:
        return result.si_status, None, True
    return None, result.si_status, True


def _readable(pidfd: int) -> bool:
    """The process behind it has ended."""
    poll = select.poll()  # select() cannot take descriptors from 1024 on
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
