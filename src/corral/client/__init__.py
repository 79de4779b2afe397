"""Callers of the API: ``corral.connect()`` for asyncio, ``corral.sync.connect()`` for everything else.

Both are thin over :mod:`corral.client.calls` (what is asked, without I/O) and one transport each: ``sync/http.py`` on
the standard library, because a command must start in milliseconds, ``aio/http.py`` on httpx2. Errors arrive as the
:class:`~corral.errors.CorralError` that the daemon raised. May not know how the daemon works; nothing heavy is imported
until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient
    from corral.client.sync import Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from corral.client.sync import Client

        return Client
    if name == "AsyncClient":
        from corral.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
