"""Finding out who answers in a guest: corral-guest or qemu-guest-agent, whoever is first, the former preferred."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from corral.errors import CorralError
from corral.guest.protocol import Guest
from corral.guest.qga import open_qga
from corral.guest.resident import open_resident, unresponsive
from corral.runtime import Runtime

PREFERENCE_S = 0.5
"""How long corral-guest may still answer after qemu-guest-agent did: an image may have both."""

Prefer = Literal["any", "resident", "qga"]


async def connect(
    channels_guest: Path, channels_qga: Path, rt: Runtime, *, prefer: Prefer = "any", timeout: float = 300.0
) -> Guest:
    """A connection to the agent that answers. ``prefer``: ask only corral-guest (``resident``) or only ``qga``.

    Waiting costs nothing while the guest boots: corral-guest's own announcement ends it at once, so call it with a
    long timeout rather than often. QEMU serves one client at a time on each socket: close what you no longer use.
    Raises Unavailable ``unresponsive`` with both reasons, as soon as neither can answer any more.
    """
    opens: dict[str, Callable[[], Awaitable[Guest]]] = {}
    if prefer in ("any", "resident"):
        opens["resident"] = lambda: open_resident(channels_guest, rt, timeout=timeout)
    if prefer in ("any", "qga"):
        opens["qga"] = lambda: open_qga(channels_qga, rt, timeout=timeout)
    attempts = {name: asyncio.ensure_future(call()) for name, call in opens.items()}
    assert attempts, f"nobody is called {prefer!r}"
    winner: asyncio.Future[Guest] | None = None
    try:
        waiting: set[asyncio.Future[Guest]] = set(attempts.values())
        while waiting and winner is None:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            good = [attempt for attempt in done if attempt.exception() is None]
            if good and waiting and attempts.get("resident") in waiting:
                more, waiting = await asyncio.wait(waiting, timeout=PREFERENCE_S)
                good += [attempt for attempt in more if attempt.exception() is None]
            winner = next((a for a in attempts.values() if a in good), None)
        if winner is None:
            raise _neither([attempt.exception() for attempt in attempts.values()])
        return winner.result()
    finally:
        for attempt in attempts.values():
            if attempt is not winner:
                await _discard(attempt)


async def _discard(attempt: asyncio.Future[Guest]) -> None:
    attempt.cancel()
    await asyncio.wait([attempt])
    if not attempt.cancelled() and attempt.exception() is None:
        await attempt.result().close()


def _neither(errors: list[BaseException | None]) -> BaseException:
    """One error of several; one that is not ours is passed on as it is, it is a bug."""
    foreign = [error for error in errors if error is not None and not isinstance(error, CorralError)]
    return foreign[0] if foreign else unresponsive("; ".join(str(error) for error in errors))
