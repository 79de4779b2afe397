"""The agent as the API sees it: implements :class:`corral.api.live.Live` for the VMs of this host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.agent.agent import Agent
from corral.agent.doctor import examine
from corral.agent.enforcement import enforcement
from corral.errors import CorralError, NotFound, Refused
from corral.guest.protocol import Command, GuestInfo, Process
from corral.model import Phase, Vm
from corral.model.usage import Usage

if TYPE_CHECKING:
    from corral.api.live import SerialSession

MOST_TAIL = 1 << 20
ANSWERING = (Phase.RUNNING, Phase.UNRESPONSIVE, Phase.STARTING, Phase.STOPPING)


class AgentLive:
    """``state``: CORRAL_STATE, for the doctor's look at the disk."""

    def __init__(self, agent: Agent, state: Path) -> None:
        self._agent, self._state = agent, state

    def _vm(self, vm_id: str) -> Vm:
        """Raises NotFound for a VM that is not here."""
        vm = self._agent.picture.vms.get(vm_id)
        if vm is None or vm.status.host != self._agent.host_name:
            raise NotFound(f"VM {vm_id} is not on this host")
        return vm

    def _answering(self, vm_id: str) -> Vm:
        vm = self._vm(vm_id)
        if vm.status.phase not in ANSWERING:
            raise Refused(
                f"{vm.meta.name} is {vm.status.phase}, nobody answers in it", code="wrong-phase",
                hint=f"corral {'resume' if vm.status.phase is Phase.PAUSED else 'start'} {vm.meta.name}",
            )  # fmt: skip
        return vm

    async def run(self, vm_id: str, command: Command) -> Process:
        """Start a program in the guest. Refused ``wrong-phase``; Unavailable ``unresponsive``."""
        self._answering(vm_id)
        return await self._agent.guests.guest(vm_id).run(command)

    async def guest_info(self, vm_id: str) -> GuestInfo:
        """What the guest says about itself, now."""
        self._answering(vm_id)
        return await self._agent.guests.guest(vm_id).info()

    async def resize_console(self, vm_id: str, rows: int, columns: int) -> None:
        """Tell the guest how large the terminal at its serial line is; a guest that cannot be told is left as it is."""
        self._answering(vm_id)
        argv = ("stty", "-F", "/dev/ttyS0", "rows", str(rows), "cols", str(columns))
        try:
            process = await self._agent.guests.guest(vm_id).run(Command(argv=argv))
            try:
                async for _ in process.output():
                    pass
            finally:
                await process.close()
        except CorralError as error:
            if error.code not in ("guest", "unsupported", "unresponsive"):
                raise

    def console(self, vm_id: str) -> AbstractAsyncContextManager[SerialSession]:
        self._vm(vm_id)
        return self._agent.joined.consoles.session(vm_id)

    async def serial_log(self, vm_id: str, tail: int) -> bytes:
        """The log's last bytes; a VM that has not run yet has none."""
        self._vm(vm_id)
        return self._agent.joined.consoles.tail(vm_id, min(max(tail, 0), MOST_TAIL))

    def follow_log(self, vm_id: str) -> AsyncIterator[bytes]:
        self._vm(vm_id)
        return self._agent.joined.consoles.follow(vm_id)

    async def receive(self, image_id: str, chunks: AsyncIterator[bytes], length: int | None) -> None:
        """Take an image's content; its check goes on after this returns."""
        await self._agent.images.receive(image_id, chunks, length)

    async def probe(self) -> None:
        """Try the accelerators again, for real, and write the host's record."""
        await self._agent.registration.refresh(again=True)

    async def usage(self, *, lately: bool = False) -> Usage:
        """Who uses what on this host, now; ``lately``: CPU time of VMs averaged over the last seconds."""
        return await (self._agent.meter.lately() if lately else self._agent.meter.usage())

    async def doctor(self) -> list[dict[str, Any]]:
        """Checks of this host, as found now."""
        problem, capabilities = "", None
        try:
            capabilities = await self._agent.engine.probe()
        except CorralError as error:
            problem = error.message
        enforced = enforcement(self._agent.joined.groups)
        return examine(self._agent.joined.facts(), capabilities, self._state, problem=problem, enforced=enforced)
