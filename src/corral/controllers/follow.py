"""The loop of a controller: read the records, follow their changes, read again when some may have been missed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from corral.errors import Unavailable
from corral.runtime import KeyedQueue, Runtime, Supervisor

log = structlog.get_logger("controllers")

AGAIN_S = 0.5


async def follow(
    name: str,
    queue: KeyedQueue,
    rt: Runtime,
    read: Callable[[], Awaitable[int]],
    watch: Callable[[int], Awaitable[None]],
) -> None:
    """Serve until cancelled.

    Args:
        queue: where both put what is to be looked at.
        read: takes in all there is; as of which revision.
        watch: takes in what changes after that, until it raises Unavailable.
    """
    supervisor = Supervisor(rt.clock)
    supervisor.start(f"{name}-queue", queue.run)
    try:
        while True:
            try:
                await watch(await read())
            except Unavailable as error:
                log.warning("the records are read again", controller=name, error=error.message)
            await rt.clock.sleep(AGAIN_S)
    finally:
        await supervisor.close()
