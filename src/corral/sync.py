"""The synchronous twin of ``import corral``.

with corral.sync.connect() as c:
    vm = c.vms.launch("debian")
with corral.sync.sandbox("debian") as vm:
    print(vm.run("uname", "-a").text)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from corral.client.sync import Client, Vm

__all__ = ["Client", "Vm", "connect", "sandbox"]


def connect(url: str | None = None, **options: Any) -> Client:
    """A client of this machine's daemon, or of ``url``. Options are those of :class:`Client`."""
    return Client(url, **options)


@contextmanager
def sandbox(image: str, *, client: Client | None = None, **options: Any) -> Iterator[Vm]:
    """A VM for the length of the block, deleted whatever happens. Options are those of ``c.vms.launch``."""
    own = client or Client().__enter__()
    try:
        begun = own.vms.begin_launch(image, **options)
        try:
            yield own.vms.finish_launch(begun)
        finally:
            own.vms.delete(begun.items[0].id, force=True, wait=False)
    finally:
        if client is None:
            own.close()
