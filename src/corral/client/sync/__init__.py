"""The synchronous client: ``with corral.sync.connect() as c: vm = c.vms.launch("debian")``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from corral.client import calls, local
from corral.client.address import resolve
from corral.client.record import PLURALS, SILENCE_S, Accepted, Batch, Page, Record, Result
from corral.client.sync.http import Http
from corral.client.sync.resources import Events, Hosts, Images, Resource, Tasks, Templates, follow, read_batches
from corral.client.sync.vms import Vm, Vms

__all__ = ["Accepted", "Batch", "Client", "Page", "Record", "Resource", "Result", "Vm"]


class Client:
    """A connection to a daemon; made lazily, so that building one costs nothing and cannot fail but for a bad URL.

    Args:
        url: ``http(s)://HOST:PORT`` or ``unix:/PATH``; default ``CORRAL_URL``, then this machine's daemon.
        state: the local daemon's state directory, instead of ``CORRAL_STATE``.
        project: whose things bare names mean; default ``CORRAL_PROJECT``, then ``default``.
        timeout: longest time for one request, seconds (waits and streams have their own).
    """

    def __init__(
        self, url: str | None = None, *, state: str | os.PathLike[str] | None = None, token: str | None = None,
        project: str | None = None, timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.project = project or os.environ.get("CORRAL_PROJECT") or "default"
        self.http = Http(resolve(url, state), token=token or os.environ.get("CORRAL_TOKEN", ""), timeout=timeout)
        self.vms = Vms(self, "vms")
        self.images = Images(self, "images")
        self.templates = Templates(self, "templates")
        self.flavors = Resource(self, "flavors")
        self.volumes = Resource(self, "volumes")
        self.networks = Resource(self, "networks")
        self.projects = Resource(self, "projects")
        self.hosts = Hosts(self, "hosts")
        self.tasks = Tasks(self, "tasks")
        self.events = Events(self, "events")

    def __enter__(self) -> Client:
        """This machine's daemon is started if none runs."""
        local.ensure(self.http.address)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def resource(self, plural: str) -> Resource:
        """The noun of that (plural) name, for callers that go by the table of kinds."""
        found = getattr(self, plural)
        assert isinstance(found, Resource), plural
        return found

    def version(self) -> dict[str, Any]:
        """``version``, ``pid``, ``state`` … of the daemon."""
        return dict(self.http.send(calls.plain("version")))

    def doctor(self) -> list[dict[str, Any]]:
        """Checks of this host: ``name``, ``ok`` (true, false or "warn"), ``message``, ``hint``."""
        return list(self.http.send(calls.plain("doctor"))["items"])

    def usage(self) -> dict[str, Any]:
        """Who uses what on this host, now: ``host``, ``projects``, ``vms``. CPU in cores, memory in bytes."""
        return dict(self.http.send(calls.plain("usage")))

    def schema(self) -> dict[str, Any]:
        """The structure of every kind, for ``corral explain``."""
        return dict(self.http.send(calls.plain("schema")))

    def watch(
        self, *kinds: str, project: str | None = None, from_revision: int | None = None, id: str = "",
        until: float | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """Changes of these kinds (all without any), as they happen. The first batch is empty: it says where it starts.

        ``until``: monotonic time after which it ends with TimedOut. Raises WatchLost: list again and start from there.
        """
        call = calls.watch(kinds, project=project or "", from_revision=from_revision, id=id)
        with self.http.stream(call, timeout=SILENCE_S) as stream:
            batches = read_batches(stream.lines())
            while True:
                if until is not None:
                    stream.set_timeout(min(SILENCE_S, max(0.01, until - time.monotonic())))
                batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def follow(self, kind: str, first: Record, timeout: float | None = None) -> Iterator[Record]:
        """``first``, then the same object at each of its changes, across restarts of the daemon; ends when deleted."""
        return follow(self, kind, first, timeout)

    def read(self, kind: str, id: str, record: type[Record] = Record) -> Record:
        """An object by kind and id."""
        return record(self.http.send(calls.get(PLURALS[kind], id, self.project)))
