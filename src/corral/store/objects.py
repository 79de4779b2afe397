"""Typed objects over a store: one record an object, names unique, every change a compare-and-swap.

Keys: ``/<plural>/<id>`` holds the object as JSON; ``/names/<plural>/<project>/<name>`` holds its id, written and
removed in the same transaction. Tasks and events have no names of their own and so no such entry. ``meta.revision`` is
the record's mod revision: it is set when an object is read and is the ETag of everything above.
"""

from __future__ import annotations

import string
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Generic, NamedTuple, TypeVar, cast

import msgspec

from corral.errors import Bug, CorralError, NotFound, Refused
from corral.model.base import Resource
from corral.model.kinds import KINDS, PLURALS, Kind
from corral.runtime import Runtime
from corral.store.protocol import Batch, Compare, Delete, Entry, Op, Put, Store

T = TypeVar("T", bound=Resource)

CACHED = 50_000
"""Decoded objects kept, by key and revision: a list of all VMs then decodes only what changed."""

ATTEMPTS = 50
"""Read-modify-swap rounds before giving up: far more than the writers that meet on one object."""

MIN_PREFIX = 4
_ID_CHARACTERS = frozenset(string.hexdigits.lower() + "-")
_NAMELESS = frozenset({"task", "event"})


class Create(NamedTuple):
    """Write a new object; its id and name must be free."""

    object: Resource


class Update(NamedTuple):
    """Replace an object that still has the revision it was read with."""

    object: Resource


class Remove(NamedTuple):
    """Delete an object that still has the revision it was read with, and free its name."""

    object: Resource


class Require(NamedTuple):
    """Change nothing, but fail unless the object still has the revision it was read with."""

    object: Resource


Write = Create | Update | Remove | Require


class Listing(NamedTuple, Generic[T]):
    """Objects as of one revision, by name."""

    items: tuple[T, ...]
    revision: int


class ObjectChange(NamedTuple):
    """One change. ``object`` is None for a deletion; ``previous`` is what was there before, None for a creation."""

    kind: str
    id: str
    object: Resource | None
    previous: Resource | None


class ObjectBatch(NamedTuple):
    """What one transaction changed among the watched kinds."""

    revision: int
    changes: tuple[ObjectChange, ...]


class Objects:
    """The only way from everything above to the store.

    Errors: NotFound; Refused ``exists``, ``stale``, ``ambiguous``; the store's Unavailable and Unknown pass through.
    """

    def __init__(self, store: Store, rt: Runtime) -> None:
        self.store, self._rt = store, rt
        self._cache: OrderedDict[str, tuple[int, Resource]] = OrderedDict()

    async def get(self, cls: type[T], id: str) -> T:
        """The object with this id. Raises NotFound."""
        entry = await self.store.get(_key(cls.KIND, id))
        if entry is None:
            raise _not_found(cls, id)
        return self._decode(cls, entry)

    async def find(self, cls: type[T], ref: str, project: str = "default") -> T:
        """The object that a person means: a name, ``PROJECT/NAME``, an id, or the unique beginning of an id.

        Raises NotFound, or Refused ``ambiguous`` when a beginning fits several. A name wins over an id's beginning.
        """
        kind = KINDS[cls.KIND]
        if not ref:
            raise _not_found(cls, ref)
        scope, _, name = ref.rpartition("/")
        names = await self.store.get(_name_key(kind, scope or project, name))
        if names is not None:
            try:
                return await self.get(cls, names.value.decode())
            except NotFound:
                pass  # deleted between the two reads: it is not found under this name, look on
        if not _ID_CHARACTERS.issuperset(ref):
            raise _not_found(cls, ref)
        entry = await self.store.get(_key(kind.name, ref))
        if entry is not None:
            return self._decode(cls, entry)
        if len(ref) < MIN_PREFIX:
            raise _not_found(cls, ref)
        found = (await self.store.range(_key(kind.name, ref), limit=2)).entries
        if len(found) > 1:
            raise Refused(
                f"{ref!r} is the beginning of more than one {kind.name}'s id",
                code="ambiguous",
                hint="give more of the id",
            )
        if not found:
            raise _not_found(cls, ref)
        return self._decode(cls, found[0])

    async def list(self, cls: type[T], project: str | None = None) -> Listing[T]:
        """All objects of a kind (of one project), sorted by name, then age."""
        snapshot = await self.store.range(_key(cls.KIND, ""))
        items = [self._decode(cls, entry) for entry in snapshot.entries]
        if project is not None and KINDS[cls.KIND].scoped:
            items = [item for item in items if item.meta.project == project]
        items.sort(key=lambda item: (item.meta.name, item.meta.created, item.meta.id))
        return Listing(tuple(items), snapshot.revision)

    async def create(self, *objects: T) -> tuple[T, ...]:
        """Write new objects in one transaction and return them with their revision. Refused ``exists``."""
        return cast("tuple[T, ...]", await self.commit([Create(one) for one in objects]))

    async def update(self, obj: T) -> T:
        """Replace the object if nobody did since it was read; returns it with its new revision. Refused ``stale``."""
        return cast(T, (await self.commit([Update(obj)]))[0])

    async def delete(self, obj: Resource) -> None:
        """Delete the object and free its name, if nobody changed it since it was read. Refused ``stale``."""
        await self.commit([Remove(obj)])

    async def change(self, cls: type[T], id: str, mutate: Callable[[T], T | None]) -> T:
        """Read, ``mutate``, swap; again when somebody was faster.

        ``mutate`` returning None or an equal object: nothing is written. It may run more than once and must not have
        effects. Raises NotFound; Refused ``conflict`` after many rounds.
        """
        for _ in range(ATTEMPTS):
            current = await self.get(cls, id)
            wanted = mutate(current)
            if wanted is None or wanted == current:
                return current
            assert wanted.meta.revision == current.meta.revision, "mutate must keep meta.revision"
            try:
                return await self.update(wanted)
            except Refused as error:
                if error.code != "stale":
                    raise
        raise Refused(f"{cls.KIND} {id} kept changing while it was being written", code="conflict", hint="try again")

    async def commit(self, writes: Sequence[Write], *, taking: Sequence[Entry] = ()) -> tuple[Resource, ...]:
        """All the writes in one transaction, or none. Returns what was created and updated, in order.

        Args:
            taking: keys that are no objects, which are removed with it if they still are as they were read.

        Raises Refused ``exists`` (an id or name of a Create is taken) or ``stale`` (another has changed or is gone).
        """
        compares: list[Compare] = [Compare(entry.key, "mod", "==", entry.mod_revision) for entry in taking]
        ops: list[Op] = [Delete(entry.key) for entry in taking]
        for write in writes:
            _plan(write, compares, ops)
        result = await self.store.txn(compares, ops)
        if not result.succeeded:
            await self._explain(writes)
        for write in writes:
            if isinstance(write, Remove):
                self._cache.pop(_key(write.object.KIND, write.object.meta.id), None)
        # Not put into the cache: what is read back is what the record says, never what a caller happened to pass.
        return tuple(_with_revision(w.object, result.revision) for w in writes if isinstance(w, Create | Update))

    async def watch(self, *classes: type[Resource], from_revision: int) -> AsyncIterator[ObjectBatch]:
        """Changes of these kinds from ``from_revision`` on (a list's revision + 1), a batch for each transaction.

        Raises WatchLost when something may have been missed: list again.
        """
        prefix = _key(classes[0].KIND, "") if len(classes) == 1 else "/"
        plurals = {KINDS[cls.KIND].plural for cls in classes}
        # aclosing: whoever stops listening (or is cancelled) closes the store's iterator too, at once.
        async with aclosing(cast(Any, self.store.watch(prefix, from_revision))) as batches:
            async for batch in batches:
                changes = self._changes(batch, plurals)
                if changes:
                    yield ObjectBatch(batch.revision, changes)

    def _changes(self, batch: Batch, plurals: set[str]) -> tuple[ObjectChange, ...]:
        changes: list[ObjectChange] = []
        for change in batch.changes:
            _, plural, id, *_ = change.key.split("/")
            if plural not in plurals:
                continue
            cls = PLURALS[plural].cls
            now = self._decode(cls, change.entry) if change.entry else None
            if now is None:  # gone; an earlier change may have put it back, read since it was removed
                self._cache.pop(change.key, None)
            # What was there before is shown as it was, but must not push the present out of the cache.
            before = self._decode(cls, change.previous, keep=False) if change.previous else None
            changes.append(ObjectChange(cls.KIND, id, now, before))
        return tuple(changes)

    async def _explain(self, writes: Sequence[Write]) -> None:
        """Say which compare failed: the one that still would, or else simply ``stale``."""
        for write in writes:
            obj, kind = write.object, KINDS[write.object.KIND]
            entry = await self.store.get(_key(kind.name, obj.meta.id))
            if isinstance(write, Create):
                named = await self.store.get(_name_key(kind, obj.meta.project, obj.meta.name)) if _named(obj) else None
                if named is not None or entry is not None:
                    raise Refused(
                        f"there is a {kind.name} {obj.meta.name!r} already", code="exists", field="name",
                        hint="choose another name, or leave the name out to have one made",
                    )  # fmt: skip
            elif entry is None or entry.mod_revision != obj.meta.revision:
                what = "is gone" if entry is None else "has changed"
                raise Refused(
                    f"{kind.name} {obj.meta.name!r} {what} since it was read", code="stale", hint="read it again"
                )
        raise Refused("something changed since it was read, and back", code="stale", hint="read again")

    def _decode(self, cls: type[T], entry: Entry, *, keep: bool = True) -> T:
        cached = self._cache.get(entry.key)
        if cached is not None and cached[0] == entry.mod_revision:
            return cast(T, cached[1])
        try:
            obj = _decoder(cls).decode(entry.value)
        except msgspec.MsgspecError as error:
            raise CorralError(
                f"the record {entry.key} cannot be read: {error}", code="bug",
                hint="was it written by a newer version of Corral?",
            ) from error  # fmt: skip
        # The object is new and nobody else's yet, so setting the revision in place cannot be seen.
        msgspec.structs.force_setattr(obj.meta, "revision", entry.mod_revision)
        if keep and (cached is None or cached[0] < entry.mod_revision):
            self._remember(entry.key, entry.mod_revision, obj)
        return obj

    def _remember(self, key: str, revision: int, obj: Resource) -> None:
        self._cache[key] = (revision, obj)
        self._cache.move_to_end(key)
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)


_encoder = msgspec.json.Encoder()
_decoders: dict[type[Resource], msgspec.json.Decoder[Any]] = {}


def _decoder(cls: type[T]) -> msgspec.json.Decoder[T]:
    if cls not in _decoders:
        _decoders[cls] = msgspec.json.Decoder(cls)
    return _decoders[cls]


def _key(kind: str, id: str) -> str:
    return f"/{KINDS[kind].plural}/{id}"


def _named(obj: Resource) -> bool:
    return obj.KIND not in _NAMELESS


def _name_key(kind: Kind, project: str, name: str) -> str:
    return f"/names/{kind.plural}/{project if kind.scoped else '-'}/{name}"


def _not_found(cls: type[Resource], ref: str) -> NotFound:
    plural = KINDS[cls.KIND].plural
    return NotFound(f"there is no {cls.KIND} {ref!r}", hint=f"see the {plural} there are with: corral {cls.KIND} list")


def _with_revision(obj: T, revision: int) -> T:
    return msgspec.structs.replace(obj, meta=msgspec.structs.replace(obj.meta, revision=revision))


def _plan(write: Write, compares: list[Compare], ops: list[Op]) -> None:
    """Add what one write asks for to a transaction."""
    obj = write.object
    kind = KINDS[obj.KIND]
    key, name = _key(kind.name, obj.meta.id), _name_key(kind, obj.meta.project, obj.meta.name)
    if "/" in obj.meta.id or not obj.meta.id or (_named(obj) and ("/" in obj.meta.name or not obj.meta.name)):
        raise Bug(f"{kind.name} with id {obj.meta.id!r} and name {obj.meta.name!r} cannot be a key")
    if isinstance(write, Create):
        compares.append(Compare(key, "mod", "==", 0))
        if _named(obj):
            compares.append(Compare(name, "mod", "==", 0))
            ops.append(Put(name, obj.meta.id.encode()))
    else:
        assert obj.meta.revision > 0, f"{kind.name} {obj.meta.name} was never read from the store"
        compares.append(Compare(key, "mod", "==", obj.meta.revision))
    if isinstance(write, Create | Update):
        ops.append(Put(key, _encoder.encode(obj)))
    elif isinstance(write, Remove):
        ops.append(Delete(key))
        if _named(obj):
            ops.append(Delete(name))
