"""The agents inside the guests: connected while they boot, pinged while they run, told who they are.

Each VM has its own link with two loops, so that a silent one delays nobody: one talks to the guest, one looks at the
hypervisor whenever the guest does not vouch for it. Both only remember what they see and call ``changed``; what it
means is decided in :mod:`corral.agent.reconcile`. Nothing here writes records: an idle VM costs a ping each 5 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from corral.agent.ports import ConnectGuest
from corral.agent.reconcile import OFF_STATES, GuestView
from corral.agent.settings import Settings
from corral.engine.protocol import Engine, State
from corral.errors import CorralError, Unavailable
from corral.guest.protocol import Guest, GuestInfo, Identity
from corral.runtime import Runtime, deadline
from corral.scheduler.suspicion import Suspicion

log = structlog.get_logger("guests")

RECONNECT_S = (0.1, 2.0)
"""First and longest pause between connections: a boot must be noticed at once, a dead socket must not be hammered."""
LASTED_S = 5.0
CLOSE_S = 2.0
LATE = 1.5
"""A time-out that took this many times as long was ours: this process did not run, and the guest may have answered."""
CONNECT_S = 60.0
"""A connection attempt is renewed after this long: the guest may have been reset in a moment that was not seen."""


@dataclass(slots=True)
class Link:
    """What is known of one guest."""

    vm_id: str
    expected: bool
    identity: Callable[[], Identity]
    booting: bool
    welcome: Callable[[Guest], Awaitable[None]] | None = None
    """Of a fork: makes it somebody of its own, in place of ``identity``, once."""
    resident: bool = True
    """corral-guest is in its image."""
    trouble: str = ""
    """Why it is not somebody of its own yet."""
    held: bool = False
    guest: Guest | None = None
    answered: bool = False
    info: GuestInfo | None = None
    state: State | None = None
    heard: float = 0.0
    vouches: bool = False
    """Its last heartbeat came."""
    gone: bool = False
    """Nobody in the guest holds its agent's port open, as last seen."""
    hung_at: float | None = None
    silent_at: float | None = None
    """When the guest was called hung, and the hypervisor silent."""
    greet: bool = True
    """It has to be told who it is (after a boot) before it counts as answering."""
    silence: Suspicion = field(default_factory=Suspicion)
    engine_silence: Suspicion = field(default_factory=Suspicion)
    renew: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Guests:
    """The links of one host's VMs.

    Args:
        changed: called with a VM's id when something about its guest or its hypervisor changed.
        part: what part of the CPU time that a VM wants it gets at present (1 where nobody knows).
    """

    def __init__(
        self, engine: Engine, connect: ConnectGuest, rt: Runtime, settings: Settings, changed: Callable[[str], None],
        part: Callable[[str], float],
    ) -> None:  # fmt: skip
        self._engine, self._connect, self._rt = engine, connect, rt
        self._settings, self._changed, self._part = settings, changed, part
        self._links: dict[str, Link] = {}

    def ensure(
        self, vm_id: str, *, expected: bool, booting: bool, held: bool, identity: Callable[[], Identity],
        welcome: Callable[[Guest], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        """Have a link to a VM whose process is there. ``held``: it is paused and cannot answer.

        ``welcome``: what a fork is to be told at its first answer; somebody answers in it, whatever its image has.
        """
        if vm_id in self._links:
            return
        link = Link(vm_id, expected or welcome is not None, identity, booting, welcome, resident=expected, held=held)
        link.heard = self._rt.clock.monotonic()
        link.greet = booting
        link.silence = link.engine_silence = Suspicion(limit=self._settings.misses)
        link.task = asyncio.get_running_loop().create_task(self._serve(link), name=f"guest-{vm_id}")
        self._links[vm_id] = link

    async def drop(self, vm_id: str) -> None:
        """The process is gone, or about to go."""
        link = self._links.pop(vm_id, None)
        if link is not None and link.task is not None:
            link.task.cancel()
            await asyncio.gather(link.task, return_exceptions=True)

    def view(self, vm_id: str) -> GuestView:
        link = self._links.get(vm_id)
        if link is None:
            return GuestView()
        now = self._rt.clock.monotonic()
        hung = now - link.hung_at if link.hung_at is not None else 0.0
        return GuestView(
            link.expected, link.answered, link.booting, link.silence.hung, now - link.heard, link.trouble, hung,
            link.gone,
        )  # fmt: skip

    def info(self, vm_id: str) -> GuestInfo | None:
        link = self._links.get(vm_id)
        return link.info if link is not None else None

    def engine_silent_at(self, vm_id: str) -> float | None:
        """Since when its hypervisor is called silent; None while it answers."""
        link = self._links.get(vm_id)
        return link.silent_at if link is not None else None

    def engine_seen(self, vm_id: str, state: State) -> None:
        """Somebody else has looked at the hypervisor. One that was silent and answers is as good as new: what its guest
        did not say meanwhile was not the guest's fault, and if it falls silent again that is another silence."""
        link = self._links.get(vm_id)
        if link is None or state is State.UNRESPONSIVE or not link.engine_silence.missed:
            return
        link.engine_silence, link.silent_at, link.state = link.engine_silence.beat(True), None, state
        link.vouches = False
        self._excuse(link)

    def guest(self, vm_id: str) -> Guest:
        """The connection to a guest that answers. Raises Unavailable ``unresponsive``."""
        link = self._links.get(vm_id)
        if link is None or link.guest is None or link.held:
            raise Unavailable(
                "nobody answers in the guest", code="unresponsive",
                hint="it may still boot, or its image has no agent; see its console",
            )  # fmt: skip
        return link.guest

    def hold(self, vm_id: str) -> None:
        """The VM is paused or stands still: its silence means nothing."""
        if (link := self._links.get(vm_id)) is not None:
            link.held = True

    def resumed(self, vm_id: str) -> None:
        """It runs again: it counts as answering when it has been told the time."""
        if (link := self._links.get(vm_id)) is not None and link.held:
            link.held = False
            self._excuse(link)
            link.answered, link.booting = False, True
            link.renew.set()

    def rebooted(self, vm_id: str) -> None:
        """The guest starts afresh: a new agent will answer, and has to be told who it is."""
        if (link := self._links.get(vm_id)) is not None:
            link.answered, link.booting, link.greet, link.info = False, True, True, None
            self._excuse(link)
            link.renew.set()

    def _excuse(self, link: Link) -> None:
        """Its silence so far says nothing: count afresh."""
        link.silence, link.hung_at, link.gone = link.silence.beat(True), None, False
        link.heard = self._rt.clock.monotonic()

    async def close(self) -> None:
        """Let go of all guests."""
        for vm_id in list(self._links):
            await self.drop(vm_id)

    async def _serve(self, link: Link) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_for_ever(link), name=f"look-{link.vm_id}")
            group.create_task(self._talk_for_ever(link), name=f"talk-{link.vm_id}")

    async def _talk_for_ever(self, link: Link) -> None:
        first, longest = RECONNECT_S
        pause = first
        while True:
            began = self._rt.clock.monotonic()
            try:
                await self._talk(link)
            except CorralError as error:
                log.debug("guest", vm=link.vm_id, error=error.message)
            except Exception:
                # What a guest says is untrusted: whatever it breaks is its own link, tried again.
                log.exception("talking to a guest failed", vm=link.vm_id)
            pause = first if self._rt.clock.monotonic() - began >= LASTED_S else min(2 * pause, longest)
            await self._rt.clock.sleep(pause)

    async def _talk(self, link: Link) -> None:
        """One connection, from the first answer until it is given up."""
        channels = self._engine.channels(link.vm_id)
        prefer = "resident" if link.resident else "any"
        async with deadline(CONNECT_S, "connecting to the guest"):
            guest = await self._connect(channels.guest, channels.qga, self._rt, prefer=prefer)  # type: ignore[arg-type]
        try:
            link.guest = guest
            await self._rt.faults.at("start.connected")
            if link.answered:
                self._beat(link, True)
            await self._keep(link, guest)
        finally:
            link.guest = None
            try:
                async with asyncio.timeout(CLOSE_S):
                    await guest.close()
            except (TimeoutError, CorralError) as error:
                log.debug("closing a guest", vm=link.vm_id, error=str(error))

    async def _keep(self, link: Link, guest: Guest) -> None:
        """Greet, then ping, until the guest is hung (the connection is then made anew) or starts afresh."""
        beats = 0
        while True:
            if not link.answered and not link.held:
                link.renew.clear()
                await self._greet(link, guest)
            if await self._renewed(link):
                if link.greet:
                    return
                continue
            if link.held:
                continue
            beats += 1
            asked = self._rt.clock.monotonic()
            try:
                await guest.ping(self._settings.heartbeat_timeout_s)
            except CorralError:
                took = self._rt.clock.monotonic() - asked
                link.vouches = False
                if took < LATE * self._settings.heartbeat_timeout_s:
                    await self._miss(link)
                # A guest that is slow may still answer here; a connection that fails at once is broken, make another.
                if link.silence.hung or took < self._settings.heartbeat_timeout_s / 2:
                    raise
                continue
            self._beat(link, True)
            if beats % self._settings.info_every == 0 or (beats <= 3 and not (link.info and link.info.addresses)):
                await self._inform(link, guest)

    async def _renewed(self, link: Link) -> bool:
        """Wait for the next beat; True when something happened to the guest before."""
        pause = self._settings.heartbeat_s * self._rt.random.uniform(0.9, 1.1)
        try:
            async with asyncio.timeout(pause):
                await link.renew.wait()
        except TimeoutError:
            return False
        link.renew.clear()  # here, or a VM that is paused again at once would have us go round without ever waiting
        return True

    async def _greet(self, link: Link, guest: Guest) -> None:
        """Tell a guest that has just come up who it is, or one that was paused what time it is."""
        if link.greet and link.welcome is not None:
            await self._welcome(link, guest, link.welcome)
            return
        now = self._rt.clock.now()
        identity = link.identity() if link.greet else Identity(time=now)
        told, _ = await asyncio.gather(guest.identify(identity), self._inform(link, guest), return_exceptions=True)
        if isinstance(told, BaseException):
            if not isinstance(told, CorralError) or told.code == "unresponsive":
                raise told
            if told.code != "unsupported":
                log.warning("a guest did not take its identity", vm=link.vm_id, error=told.message)
                await guest.ping(self._settings.heartbeat_timeout_s)  # refused, or was the connection lost?
        if not link.renew.is_set():
            await self._answers(link)

    async def _welcome(self, link: Link, guest: Guest, welcome: Callable[[Guest], Awaitable[None]]) -> None:
        """Make a fork somebody of its own. One that is not is as good as one that does not answer: tried again."""
        try:
            await welcome(guest)
        except CorralError as error:
            if error.code != "unresponsive":
                link.trouble = error.message
                self._changed(link.vm_id)
            raise
        link.welcome, link.trouble = None, ""
        await self._answers(link)
        await self._inform(link, guest)

    async def _answers(self, link: Link) -> None:
        """It counts as answering from now on."""
        link.answered, link.booting, link.greet = True, False, False
        self._excuse(link)
        link.vouches = True
        await self._rt.faults.at("start.answered")
        self._changed(link.vm_id)

    async def _inform(self, link: Link, guest: Guest) -> None:
        try:
            info = await guest.info()
        except CorralError as error:
            log.debug("a guest says nothing about itself", vm=link.vm_id, error=error.message)
            return
        known = link.info
        link.info = info
        if known is None or (known.addresses, known.agent) != (info.addresses, info.agent):
            self._changed(link.vm_id)

    def _beat(self, link: Link, answered: bool, part: float = 1.0) -> None:
        was = link.silence.hung
        if answered:
            link.vouches = True
            self._excuse(link)
        else:
            link.silence = link.silence.beat(False, part)
        if link.silence.hung and not was:
            link.hung_at = self._rt.clock.monotonic()
        if link.silence.hung != was:
            self._changed(link.vm_id)

    async def _miss(self, link: Link) -> None:
        """A beat was missed. It counts by the CPU time that the guest got, and not at all where it could not run."""
        if (await self._engine.inspect(link.vm_id)).state is not State.RUNNING:
            self._excuse(link)
            return
        try:
            gone = not await self._engine.listens(link.vm_id)
        except CorralError as error:  # it has just ended, or fallen silent: the next look tells
            log.debug("a guest's port could not be looked at", vm=link.vm_id, error=error.message)
            return
        if gone != link.gone:
            link.gone = gone
            self._changed(link.vm_id)
        if link.guest is None or not link.vouches:  # it may have answered meanwhile
            self._beat(link, False, self._part(link.vm_id))

    async def _look_for_ever(self, link: Link) -> None:
        """Look at the hypervisor: each beat while the guest does not answer, seldom while it does."""
        beats = 0
        while True:
            await self._rt.clock.sleep(self._settings.heartbeat_s * self._rt.random.uniform(0.9, 1.1))
            beats += 1
            vouched = link.guest is not None and link.answered and link.vouches
            if vouched and beats % self._settings.inspect_every:
                continue
            try:
                await self._look(link)
                if link.guest is None and link.expected and not link.booting and not link.held:
                    await self._miss(link)
            except CorralError as error:
                log.warning("a machine could not be looked at", vm=link.vm_id, error=error.message)
            except Exception:
                log.exception("looking at a machine failed", vm=link.vm_id)

    async def _look(self, link: Link) -> None:
        sighting = await self._engine.inspect(link.vm_id)
        was = link.engine_silence.hung
        link.engine_silence = link.engine_silence.beat(sighting.state is not State.UNRESPONSIVE)
        if link.engine_silence.hung != was:
            link.silent_at = self._rt.clock.monotonic() if link.engine_silence.hung else None
        moved = link.state is not None and sighting.state is not link.state
        link.state = sighting.state
        if moved or link.engine_silence.hung != was or sighting.state in OFF_STATES:
            self._changed(link.vm_id)
