"""Machines that are ready and nobody's: a key each, and whoever removes the key has the machine.

An agent writes the key before it makes one (so that nothing is made that could not be found again), and says ``ready``
when it can be had. The transaction that creates a VM under its id removes the key: so a machine is given once, or not
at all, whoever is killed. A key that an agent wants back is first made not ready, then the machine ends, then the key
goes: what is not ready is nobody's but its agent's. Read by the API, kept by :mod:`corral.agent.templates.pool`.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from corral.model import TemplateSpec
from corral.model.template import hardware_of
from corral.store.protocol import Compare, Delete, Entry, Put, Store

PREFIX = "/ready/"


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """``id`` is that of the VM to be, ``mac`` its card's (empty: it has none)."""

    id: str
    template: str
    host: str
    mac: str = ""
    ready: bool = False


class Offer(NamedTuple):
    """One as it was read."""

    machine: Ready
    entry: Entry


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Ready)


def kind_of(project: str, spec: TemplateSpec) -> str:
    """Equal for machines that can stand for each other."""
    return hashlib.sha256(msgspec.json.encode((project, hardware_of(spec)))).hexdigest()[:24]


class ReadyBook:
    """The keys."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, kind: str, machine: Ready) -> None:
        """One is about to be made."""
        await self._store.txn([], [Put(_key(kind, machine.id), _encoder.encode(machine))])

    async def offer(self, kind: str, machine: Ready) -> None:
        """It can be had from now on."""
        await self.begin(kind, msgspec.structs.replace(machine, ready=True))

    async def withdraw(self, offer: Offer) -> bool:
        """Nobody can have it any more; False: somebody has it."""
        taken_back = msgspec.structs.replace(offer.machine, ready=False)
        still = Compare(offer.entry.key, "mod", "==", offer.entry.mod_revision)
        result = await self._store.txn([still], [Put(offer.entry.key, _encoder.encode(taken_back))])
        return result.succeeded

    async def forget(self, offer: Offer) -> None:
        """Nothing is left of it."""
        await self._store.txn([], [Delete(offer.entry.key)])

    async def all(self, kind: str = "") -> list[Offer]:
        """Those of a kind, or of all, ready or not."""
        found = await self._store.range(f"{PREFIX}{kind}/" if kind else PREFIX)
        return [Offer(_decoder.decode(entry.value), entry) for entry in found.entries]


def _key(kind: str, id: str) -> str:
    return f"{PREFIX}{kind}/{id}"
