"""The synchronous twin of ``import corral``.

with corral.sync.connect() as c:
    vm = c.vms.launch("debian")
with corral.sync.sandbox("debian") as vm:
    print(vm.run("uname", "-a").text)
"""

from __future__ import annotations

from typing import Any

from corral.client.sync import Client, Vm
from corral.client.sync.sandbox import Sandbox, sandbox

__all__ = ["Client", "Sandbox", "Vm", "connect", "sandbox"]


def connect(url: str | None = None, **options: Any) -> Client:
    """A client of this machine's daemon, or of ``url``. Options are those of :class:`Client`."""
    return Client(url, **options)
