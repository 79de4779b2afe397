"""A deadline that says what it was waiting for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from corral.errors import TimedOut


@asynccontextmanager
async def deadline(seconds: float, what: str, *, hint: str = "") -> AsyncIterator[None]:
    """Bound the block to ``seconds``; when they pass raise :class:`TimedOut` ``"{what} took longer than …"``.

    A ``TimeoutError`` that the block raises by itself passes through unchanged.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if limit.expired():
            raise TimedOut(f"{what} took longer than {seconds:g} s", hint=hint) from error
        raise
