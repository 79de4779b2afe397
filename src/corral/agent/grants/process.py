"""The governor's process: started with the first VM, ended a while after the last, started again when it dies or falls
silent.

It ends by itself when this process does (its standard input ends), letting all threads run anywhere. When it is killed
the same is done from here, so that no VM stays bound to a core that nobody steers any more.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from corral.governor.protocol import Plan, Report
from corral.runtime import Runtime

log = structlog.get_logger("governor")
SILENT_S = 10.0
"""It reports every second. One that is silent for so long is stopped or stuck: it is replaced."""
FRESH_S = 5.0
END_S = 5.0
AGAIN_S = 0.5
LINGER_S = 60.0
"""It stays for the next VM: starting it costs as much CPU time as it needs in half a minute, and VMs that live for a
second often come one after the other."""
MAX_LINE = 4 << 20


class GovernorProcess:
    """Implements :class:`corral.agent.ports.Governing`. ``state``: ``CORRAL_STATE``, which names the control groups."""

    def __init__(self, state: Path, rt: Runtime) -> None:
        self._state, self._rt = state, rt
        self._plan = Plan()
        self._changed = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._report: tuple[float, Report] | None = None

    def follow(self, plan: Plan) -> None:
        self._plan = plan
        self._changed.set()

    def report(self) -> Report | None:
        if self._report is None or self._rt.clock.monotonic() - self._report[0] > FRESH_S:
            return None
        return self._report[1]

    async def run(self) -> None:
        """Have a governor while there are VMs."""
        while True:
            while not self._plan.vms:
                self._changed.clear()
                await self._changed.wait()
            status = await self._serve()
            if self._plan.vms:
                log.warning("the governor ended; VMs go on, another one is started", status=status)
                await self._rt.clock.sleep(AGAIN_S)

    async def _serve(self) -> int | None:
        """One governor from its start to its end; its exit status."""
        arguments = [sys.executable, "-m", "corral.governor", "--state", str(self._state)]
        self._process = process = await asyncio.create_subprocess_exec(
            *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE,
            start_new_session=True,
        )  # fmt: skip
        self._changed.set()
        telling = asyncio.create_task(self._tell(process))
        try:
            await self._hear(process)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await self._end(process)
        return process.returncode

    async def _tell(self, process: asyncio.subprocess.Process) -> None:
        """Send each new plan; close its input when there was nobody left to govern for a while."""
        assert process.stdin is not None
        while True:
            await self._changed.wait()
            self._changed.clear()
            process.stdin.write(msgspec.json.encode(self._with_savings()) + b"\n")
            with suppress(ConnectionError):  # it has died; who reads from it will know
                await process.stdin.drain()
            if not self._plan.vms:
                try:
                    async with asyncio.timeout(LINGER_S):
                        await self._changed.wait()
                except TimeoutError:
                    process.stdin.close()
                    return

    def _with_savings(self) -> Plan:
        """The plan, with what VMs had saved up at the last report: a governor that is new does not know it."""
        saved = {vm.id: vm.saved for vm in self._report[1].vms} if self._report else {}
        replaced = (msgspec.structs.replace(vm, saved=saved.get(vm.id, 0.0)) for vm in self._plan.vms)
        return msgspec.structs.replace(self._plan, vms=tuple(replaced))

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                async with asyncio.timeout(SILENT_S):
                    line = await process.stdout.readline()
            except TimeoutError:
                log.warning("the governor is silent and is replaced", pid=process.pid)
                return
            if not line:
                return
            self._report = self._rt.clock.monotonic(), msgspec.json.decode(line, type=Report)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Have it gone, and its threads free, whatever state it was in."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(END_S if process.returncode is None and self._report else 1.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        cpus = os.sched_getaffinity(0)
        for vm in self._plan.vms:
            for thread in (vm.pid, *vm.threads):
                with suppress(OSError):  # it has ended
                    os.sched_setaffinity(thread, cpus)
