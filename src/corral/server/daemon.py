"""Puts the platform together and serves until it is told to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from corral.agent.agent import Agent
from corral.agent.live import AgentLive
from corral.agent.settings import Settings, read
from corral.api.app import build
from corral.api.service import Service
from corral.controllers.abandoned import Abandoned
from corral.controllers.collect import Collector
from corral.controllers.placement import Placement
from corral.errors import TimedOut
from corral.runtime import KillAt, Runtime, Supervisor, deadline
from corral.server import listen
from corral.server.home import Home, Lock, host_id, host_name, ssh_key
from corral.server.world import World, real
from corral.store.objects import Objects
from corral.store.sqlite import SqliteStore
from corral.version import __version__

log = structlog.get_logger("server")
GRACE_S = 1
"""Requests under way at the end may finish; streams are cut, their clients come again."""
FIRST_LOOK_S = 15.0
"""The API opens when the host has registered (a probe of KVM takes seconds, once per boot), or after this."""
MAX_MESSAGE = 1 << 20
"""Bytes of a websocket message: clients send 64 KiB."""
MAX_HEADERS = 32 << 10


class Quiet(uvicorn.Server):
    """uvicorn without its own idea of signals: ours end it in good order, and nothing is raised again afterwards."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    home: Home, *, addresses: tuple[str, ...] = (), engine: str = "qemu", ready_fd: int | None = None
) -> None:
    """Serve ``home`` until SIGTERM or SIGINT; VMs go on running.

    Args:
        addresses: ``HOST:PORT`` to listen on besides the unix socket; loopback only.
        engine: ``qemu``, or ``fake`` for a pretended host.
        ready_fd: a descriptor that gets one line when the API answers, and is closed.

    Raises Refused ``in-use`` when another daemon has the directory, Invalid when its ``agent.toml`` is wrong.
    """
    for text in addresses:
        listen.parse(text)
    settings = _settings(home)
    home.make()
    lock = Lock(home.state / "daemon.lock")
    try:
        await _serve_locked(home, settings, addresses, engine, ready_fd)
    finally:
        lock.release()


async def _serve_locked(
    home: Home, settings: Settings, addresses: tuple[str, ...], engine: str, ready_fd: int | None
) -> None:
    rt = Runtime(faults=KillAt.from_environment())
    world = _world(home, rt, engine)
    store = await SqliteStore(home.store, rt).open()
    supervisor = Supervisor(rt.clock)
    sockets: list[socket.socket] = []
    try:
        sockets += [listen.tcp(text) for text in addresses]
        objects = Objects(store, rt)
        service = Service(objects, rt, catalogue=world.catalogue)
        await service.ensure_defaults()
        agent = Agent(
            objects, world.engine, world.joined, rt,
            host_name=host_name(), host_id=host_id(home, rt.random), ssh_key=ssh_key(home),
            settings=settings,
        )  # fmt: skip
        live = AgentLive(agent, home.state)
        names = tuple(listen.text_of(one) for one in sockets)
        supervisor.start("service", service.run)
        supervisor.start("holds", service.holds.run)
        supervisor.start("placement", Placement(objects, rt).run)
        supervisor.start("collector", Collector(objects, rt).run)
        supervisor.start("agent", agent.run)
        await _registered(agent, rt)
        # Not before the API can answer: those who hold VMs come back through it.
        supervisor.start("abandoned", Abandoned(objects, rt).run)

        def about() -> dict[str, Any]:
            return {
                "version": __version__,
                "pid": os.getpid(),
                "state": str(home.state),
                "listen": names,
                "engine": engine,
            }

        app = build(service, live, about)
        sockets.append(listen.unix(home.socket))
        await _answer(app, sockets, home, ready_fd)
    finally:
        home.socket.unlink(missing_ok=True)
        for one in sockets:
            one.close()
        await supervisor.close()
        await world.engine.close()
        await store.close()
        log.info("ended")


def _settings(home: Home) -> Settings:
    """What the host's ``agent.toml`` says. ``CORRAL_TEMPLATES=off``: no templates but those that are asked for, and no
    forks made ahead (unless ``CORRAL_WARM=on``).
    """
    templates = _is_on("CORRAL_TEMPLATES", True)
    return read(home.state / "agent.toml", Settings(templates=templates, warm=_is_on("CORRAL_WARM", templates)))


def _is_on(name: str, usual: bool) -> bool:
    return os.environ.get(name, "on" if usual else "off") not in ("off", "0", "no", "false")


def _world(home: Home, rt: Runtime, engine: str) -> World:
    if engine == "fake":
        from corral.server.pretend import pretended

        return pretended(home, rt)
    return real(home, rt)


async def _registered(agent: Agent, rt: Runtime) -> None:
    """Wait until this host is known, so that the first request finds a place for its VM."""
    try:
        async with deadline(FIRST_LOOK_S, "the first look at this host"):
            while await agent.registration.known() is None:
                await rt.clock.sleep(0.02)
    except TimedOut as error:
        log.warning("serving before this host is known", error=error.message)


async def _answer(app: Any, sockets: list[socket.socket], home: Home, ready_fd: int | None) -> None:
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=False, lifespan="on", http="h11",
        ws="websockets-sansio", ws_max_size=MAX_MESSAGE, ws_per_message_deflate=False, ws_ping_interval=None,
        h11_max_incomplete_event_size=MAX_HEADERS, timeout_graceful_shutdown=GRACE_S, timeout_keep_alive=300,
        backlog=listen.BACKLOG,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").addFilter(_no_cut_requests)
    server = Quiet(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, server)
    announcing = asyncio.create_task(_announce(server, home, ready_fd))
    try:
        await server.serve(sockets=sockets)
    finally:
        announcing.cancel()
        with suppress(asyncio.CancelledError):
            await announcing
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _no_cut_requests(record: logging.LogRecord) -> bool:
    """A stream that is cut when the daemon ends is no error."""
    cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and not record.msg.startswith("Cancel ")


def _stop(server: uvicorn.Server) -> None:
    server.should_exit = True


async def _announce(server: uvicorn.Server, home: Home, ready_fd: int | None) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn has a flag and no event
        await asyncio.sleep(0.01)
    log.info("serving", state=str(home.state), pid=os.getpid())
    if ready_fd is not None:
        os.write(ready_fd, b"ready\n")
        os.close(ready_fd)
    # What was loaded stays for ever: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()


def home_of(state: Path) -> Home:
    """The home with the cache that CORRAL_CACHE names, or its own."""
    cache = os.environ.get("CORRAL_CACHE")
    return Home(state, Path(os.path.abspath(cache)) if cache else state / "cache")  # noqa: PTH100 - keeps links
