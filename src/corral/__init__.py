"""Corral: a virtualization platform. ``import corral`` is its Python face (see :mod:`corral.client`).

    async with corral.connect() as c:
        vm = await c.vms.launch("debian")
    async with corral.sandbox("debian") as vm:
        result = await vm.run("python3", "-c", "print(1)")

:mod:`corral.sync` is the synchronous twin. Everything loads when it is first used: the command line imports this too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corral.version import __version__

if TYPE_CHECKING:
    from corral.client.aio import AsyncClient, AsyncSandbox, connect, sandbox

__all__ = ["AsyncClient", "AsyncSandbox", "__version__", "connect", "sandbox"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "AsyncSandbox", "connect", "sandbox"):
        from corral.client import aio

        return getattr(aio, name)
    if name == "sync":
        import importlib

        return importlib.import_module("corral.sync")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
