"""Makes templates: boots a guest for nothing else, waits until it is at rest, freezes it, and cuts its power.

Everything may be interrupted and repeated: what is found on the host says how far it got. The machine has an id that
follows from the template's, a seed of its own with no key and no user data, and no published port; nothing of it is
left afterwards. A running VM is frozen the same way, except that it goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import structlog

from corral.agent.groups import disband
from corral.agent.machine import machine_of, wants_root, wants_seed
from corral.agent.picture import boot_id
from corral.agent.ports import BootFiles, Joined
from corral.agent.reconcile import OFF_STATES
from corral.agent.templates.scripts import SETTLE, run
from corral.agent.templates.welcome import DNS
from corral.engine.protocol import Drive, Engine, Machine, State
from corral.engine.protocol import Template as Frozen
from corral.errors import CorralError, TimedOut
from corral.guest.protocol import Guest, Identity
from corral.model import Cpu, Disk, Memory, Meta, Nic, Template, Vm, VmSpec
from corral.runtime import Runtime, deadline
from corral.storage.seed import Seed

log = structlog.get_logger("templates")

HOSTNAME = "template"
ANSWER_S = 300.0
"""A guest that boots under emulation on a busy host."""
SETTLE_S = 180.0
READY_EVERY_S = 0.5
REST_S = 2.0
"""What was started last has printed its last line and closed its files by then; forks would all repeat the rest."""
TALKS = 3
"""Times that a guest is asked, before it is given up."""

Tell = Callable[[str, str], None]
"""Called with a step's name, and what is to be said of it."""


class Made(NamedTuple):
    """A template that is there. ``agent``: who answered inside."""

    frozen: Frozen
    agent: str
    hooks: bool


class TemplateBoots:
    """Boots and freezes on one host."""

    def __init__(self, engine: Engine, joined: Joined, rt: Runtime) -> None:
        self._engine, self._joined, self._rt = engine, joined, rt
        self._freezing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def make(self, template: Template, files: BootFiles, tell: Tell) -> Made:
        """Have a template of a machine that is booted for it. Raises what stood in the way; nothing is left then."""
        id = template.meta.id
        made = await self._made(id)
        if made is None:
            await self._boot(template, files, tell)
            guest, agent, hooks = await self._await_rest(template, files, tell)
            try:
                made = Made(await self._freeze_booted(template, files, tell), agent, hooks)
            finally:
                await guest.close()
        else:
            # Killed between freezing and writing it down: all that is known of the guest is what any of ours has.
            made = made._replace(agent="corral-guest" if files.agent else "qemu-guest-agent", hooks=True)
        await self._rt.faults.at("template.frozen")
        tell("power off", "")
        await self.clear(id)
        await self._rt.faults.at("template.cleared")
        return made

    async def freeze(self, template: Template, vm: Vm, files: BootFiles, tell: Tell) -> Made:
        """Have a template of a VM that runs and goes on, with its RAM and disk as they are at one instant."""
        id = vm.meta.id
        made = await self._made(template.meta.id)
        if made is None:
            tell("freeze", f"{vm.meta.name} stands still for a moment")
            async with self._freezing.setdefault(id, asyncio.Lock()):  # each goes on from what the last one left
                overlays = await self._overlays(vm, files)
                await self._rt.faults.at("template.layered")
                made = Made(await self._engine.freeze(id, template.meta.id, overlays), vm.status.guest, True)
        await self._rt.faults.at("template.frozen")
        return made._replace(agent=vm.status.guest, hooks=True)

    async def clear(self, id: str) -> None:
        """Have nothing left of the machine that was booted for a template."""
        await self._joined.consoles.detach(boot_id(id))
        await clear(self._engine, self._joined, self._rt, boot_id(id))

    async def _made(self, id: str) -> Made | None:
        for frozen in await self._engine.templates():
            if frozen.id == id and not frozen.stale:
                return Made(frozen, "", False)
        return None

    async def _boot(self, template: Template, files: BootFiles, tell: Tell) -> None:
        """Have a guest that runs for this template: found, or booted."""
        id = boot_id(template.meta.id)
        seen = await self._engine.inspect(id)
        if seen.state not in (State.CREATED, State.RUNNING):
            if seen.state not in OFF_STATES:
                log.warning("a template's guest is started again", template=template.meta.name, state=str(seen.state))
            await self.clear(template.meta.id)
            tell("volume", "")
            machine = await self._prepare(template, files)
            await self._rt.faults.at("template.disk")
            tell("start", "")
            seen = await self._engine.create(machine)
            await self._rt.faults.at("template.spawned")
        await self._joined.consoles.attach(id, self._engine.channels(id).serial)
        tell("boot", "")
        if seen.state is State.CREATED:
            await self._engine.resume(id)

    async def _prepare(self, template: Template, files: BootFiles) -> Machine:
        id, disks = boot_id(template.meta.id), self._joined.disks
        seed = None
        if wants_root(files):
            await disks.ensure_root(id, files, template.spec.disk)
        if wants_seed(files):
            seed = await disks.ensure_seed(id, Seed(instance_id=id, hostname=HOSTNAME, default_user=files.default_user))
        joins = self._joined.groups.prepare(id)
        return machine_of(pretended(template), files, root=disks.layers(id), seed=seed, ports=(), joins=joins)

    async def _await_rest(self, template: Template, files: BootFiles, tell: Tell) -> tuple[Guest, str, bool]:
        """Wait until the guest has nothing left to start: who answers in it, and whether its image has hooks.

        What a guest says while it boots may be lost: then it is asked once more, from the start. The connection stays
        open: a fork of what is frozen with it needs not learn first that somebody is on its line. Its kernel would see
        to that after everybody else whom the thaw has woken.
        """
        for last in range(TALKS, 0, -1):
            try:
                return await self._talk(template, files, tell)
            except CorralError as error:
                if last == 1 or error.code not in ("guest", "unresponsive"):
                    raise
                log.info("a template's guest is asked again", template=template.meta.name, error=error.message)
                await self._rt.clock.sleep(READY_EVERY_S)
        raise AssertionError("the last round returns or raises")

    async def _talk(self, template: Template, files: BootFiles, tell: Tell) -> tuple[Guest, str, bool]:
        channels = self._engine.channels(boot_id(template.meta.id))
        prefer: Literal["resident", "qga"] = "resident" if files.agent else "qga"
        try:
            async with deadline(ANSWER_S, "the answer of the template's guest"):
                guest = await self._joined.connect_guest(channels.guest, channels.qga, self._rt, prefer=prefer)
        except TimedOut as error:
            hint = "" if files.agent else "a template needs an image with corral-guest or qemu-guest-agent"
            raise TimedOut(error.message, hint=hint) from error
        try:
            await self._rt.faults.at("template.answered")
            await guest.identify(self._stage(template, files))
            tell("settle", "until the guest has nothing left to start")
            async with deadline(ANSWER_S, "the end of the guest's start-up"):
                while not (info := await guest.info()).ready:
                    await self._rt.clock.sleep(READY_EVERY_S)
            said = await run(guest, SETTLE, SETTLE_S, "coming to rest")
        except BaseException:
            await guest.close()
            raise
        return guest, info.agent, "hooks" in said.split()

    def _stage(self, template: Template, files: BootFiles) -> Identity:
        """The time, and the files that every fork gets: to write over one takes a fork less than to make it."""
        now = self._rt.clock.now()
        if not files.agent:
            return Identity(time=now)
        return Identity(time=now, authorized_keys=b"", dns=(DNS,) if template.spec.cards else ())

    async def _freeze_booted(self, template: Template, files: BootFiles, tell: Tell) -> Frozen:
        await self._rt.clock.sleep(REST_S)
        await self._rt.faults.at("template.settled")
        tell("freeze", "")
        overlays = await self._overlays(pretended(template), files)
        return await self._engine.freeze(boot_id(template.meta.id), template.meta.id, overlays)

    async def _overlays(self, vm: Vm, files: BootFiles) -> Mapping[str, Drive]:
        """What a machine writes to from the moment it is frozen: a fresh layer over what it writes to now."""
        if not self._joined.disks.layers(vm.meta.id):
            return {}
        now = next(drive.path for drive in await self._engine.drives(vm.meta.id) if drive.name == "root")
        layers = await self._joined.disks.next_layer(vm.meta.id, now)
        machine = machine_of(vm, files, root=layers, seed=None, ports=())
        return {drive.name: drive for drive in machine.drives if not drive.readonly}


async def clear(engine: Engine, joined: Joined, rt: Runtime, id: str) -> None:
    """Have nothing left of a machine that no VM is."""
    await engine.kill(id)
    await engine.remove(id)
    await disband(joined.groups, id, rt)
    await joined.disks.remove(id)


def pretended(template: Template, id: str = "", nics: tuple[Nic, ...] | None = None) -> Vm:
    """The VM that a template is booted as (or that a fork of it may become); no record of it exists."""
    spec = template.spec
    if nics is None:
        nics = tuple(Nic(mac=f"52:54:00:00:00:{number + 1:02x}") for number in range(spec.cards))
    return Vm(
        meta=Meta(id=id or boot_id(template.meta.id), name=template.meta.name, project=template.meta.project),
        spec=VmSpec(
            image=spec.image, image_id=spec.image_id, cpu=Cpu(count=spec.cpus, model=spec.cpu_model),
            memory=Memory(size=spec.memory), disk=Disk(size=spec.disk), firmware=spec.firmware, hostname=HOSTNAME,
            nics=nics,
        ),
    )  # fmt: skip
