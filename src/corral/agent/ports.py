"""What the agent joins, as shapes: images, disks, guests, serial consoles, facts of the host, its free ports.

The real ones are :mod:`corral.images`, :mod:`corral.storage`, :mod:`corral.guest.connect`, :mod:`corral.console`,
:mod:`corral.host.facts` and :mod:`corral.agent.forwards`; the simulator and the tests give others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from corral.governor.protocol import Plan, Report
from corral.guest.protocol import Guest
from corral.host.hostkey import HostKey
from corral.model import ImageSpec
from corral.runtime import Runtime

Progress = Callable[[str, int, int], None]
"""Called with the step's name, what is done of it, and how much there is (0: not known)."""


class BootFiles(Protocol):
    """An image as files on this host. ``boot`` says how a machine starts from it; sizes in bytes."""

    @property
    def digest(self) -> str: ...
    @property
    def boot(self) -> str: ...
    @property
    def kernel(self) -> Path | None: ...
    @property
    def initrd(self) -> Path | None: ...
    @property
    def cmdline(self) -> str: ...
    @property
    def disk(self) -> Path | None: ...
    @property
    def disk_format(self) -> str: ...
    @property
    def virtual_size(self) -> int: ...
    @property
    def firmware(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def min_memory(self) -> int: ...
    @property
    def agent(self) -> bool: ...
    @property
    def default_user(self) -> str: ...
    @property
    def size(self) -> int: ...


class Images(Protocol):
    """The image store of this host."""

    def files(self, digest: str) -> Any:
        """The :class:`BootFiles` of a digest. Raises NotFound."""
        ...

    def recipe(self, recipe: str, arch: str) -> str:
        """A digest of what a build of today would be made of, but for packages; empty: it cannot be built here."""
        ...

    async def build(self, recipe: str, arch: str, progress: Progress) -> Any: ...

    async def fetch(self, spec: ImageSpec, progress: Progress) -> Any: ...

    async def receive(self, upload_id: str, chunks: AsyncIterator[bytes], *, limit: int) -> Path: ...

    async def accept(self, path: Path, spec: ImageSpec, progress: Progress) -> Any: ...

    async def remove(self, digest: str) -> None: ...

    def inventory(self) -> list[str]: ...


class Disks(Protocol):
    """The volumes of this host's VMs."""

    async def ensure_root(self, vm_id: str, base: Any, size: int | None, *, new: bool = True) -> Path:
        """The overlay over the image's disk; made once, found afterwards. Not ``new``: it must be there (Refused)."""
        ...

    async def ensure_fork(self, vm_id: str, bases: Sequence[Path], size: int | None) -> Path:
        """A fresh disk over links of a template's layers (the uppermost first); what the VM had before goes."""
        ...

    async def next_layer(self, vm_id: str, over: Path) -> tuple[Path, ...]:
        """The VM's layers with a fresh one on top of the one that is written to now."""
        ...

    def layers(self, vm_id: str) -> tuple[Path, ...]:
        """The VM's own layers, the uppermost first, without the image."""
        ...

    async def ensure_seed(self, vm_id: str, seed: Any, *, opened: bool = False) -> Path: ...

    async def used(self, vm_id: str) -> int:
        """Bytes on disk of everything the VM has."""
        ...

    async def remove(self, vm_id: str) -> None: ...

    def inventory(self) -> list[str]:
        """Ids of the VMs that have files here."""
        ...


class ConnectGuest(Protocol):
    """Finds out who answers in a guest; returns when somebody does."""

    async def __call__(
        self, channels_guest: Path, channels_qga: Path, rt: Runtime, *, prefer: Literal["any", "resident", "qga"] = ...
    ) -> Guest: ...


class Session(Protocol):
    """One person at a serial line (see :class:`corral.api.live.SerialSession`)."""

    def output(self) -> AsyncIterator[bytes]: ...

    async def write(self, data: bytes) -> None: ...


class Consoles(Protocol):
    """The serial lines of this host's VMs."""

    async def attach(self, vm_id: str, socket: Path) -> None:
        """Listen to a VM's serial line from now on. Returns when connected, or after a short deadline, still trying."""
        ...

    async def detach(self, vm_id: str) -> None:
        """The VM's process is gone; the log stays."""
        ...

    def session(self, vm_id: str) -> AbstractAsyncContextManager[Session]: ...

    def tail(self, vm_id: str, count: int) -> bytes:
        """The last bytes of the log, whether the VM runs or not."""
        ...

    def follow(self, vm_id: str) -> AsyncIterator[bytes]: ...

    async def close(self) -> None: ...


class Facts(Protocol):
    """What a host is (:class:`corral.host.facts.HostFacts`). Bytes."""

    @property
    def arch(self) -> str: ...
    @property
    def cpus(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def memory_available(self) -> int: ...
    @property
    def disk_free(self) -> int: ...
    @property
    def kernel(self) -> str: ...
    @property
    def os(self) -> str: ...
    @property
    def boot_id(self) -> str: ...
    @property
    def privileged(self) -> bool: ...
    @property
    def memory_stalled(self) -> float: ...


ReadFacts = Callable[[], Facts]


class PortProbe(Protocol):
    """Whether ports of this host are free."""

    def free(self, protocol: str, address: str, port: int) -> bool:
        """Nobody listens there now, and this process may."""
        ...


class Groups(Protocol):
    """Control groups of this host's VMs (:class:`corral.host.cgroup.protocol.Groups`)."""

    @property
    def shares(self) -> bool: ...

    @property
    def limits_memory(self) -> bool: ...

    def describe(self) -> str: ...

    def prepare(self, id: str) -> tuple[Path, ...]: ...

    def weight(self, id: str, cores: float) -> None: ...

    def memory_limit(self, id: str, limit: int | None) -> None: ...

    def ooms(self, id: str) -> int: ...

    def starved(self, id: str) -> bool: ...

    def remove(self, id: str) -> None: ...

    def inventory(self) -> list[str]: ...

    def close(self) -> None: ...


class Governing(Protocol):
    """The governor of this host's CPU shares, running somewhere (:mod:`corral.agent.grants.process`)."""

    async def run(self) -> None:
        """Keep it alive until cancelled."""
        ...

    def follow(self, plan: Plan) -> None:
        """Govern these VMs from now on."""
        ...

    def report(self) -> Report | None:
        """What it said last; None while there is none, or it is too old to mean anything."""
        ...


async def _pretended_key() -> HostKey:
    """Of pretended guests: nobody logs in to them."""
    return HostKey(b"private\n", b"public\n")


async def _unknown(pids: Sequence[int]) -> list[int | None]:
    """Of pretended processes."""
    return [None for _ in pids]


class Joined(NamedTuple):
    """Everything the agent joins, in one hand."""

    images: Images
    disks: Disks
    connect_guest: ConnectGuest
    consoles: Consoles
    facts: ReadFacts
    ports: PortProbe
    groups: Groups
    governing: Governing
    held: Callable[[Sequence[int]], Awaitable[list[int | None]]] = _unknown
    """Bytes of the host's memory that processes hold; None of one that nobody can say of."""
    host_key: Callable[[], Awaitable[HostKey]] = _pretended_key
    """A fresh SSH host key: making one on an emulated CPU takes seconds."""
    own: Callable[[Sequence[int]], Awaitable[list[int | None]]] = _unknown
    """Bytes of it that no other process has; cheap. None as above."""
