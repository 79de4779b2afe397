"""What one command line knows: which daemon, which project, how to print; and the connection, made when first needed.

Also the few calls that commands make, by kind: objects come and go as the dictionaries of the API.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from corral.cli.failures import line
from corral.cli.parameters import pairs
from corral.client import local
from corral.client.address import state_directory
from corral.client.record import Accepted, Record
from corral.errors import Unavailable

if TYPE_CHECKING:
    from corral.client import Client


FORMATS = ("table", "wide", "json", "name")


class Session:
    """One command line's settings: the environment first, flags over it."""

    def __init__(self) -> None:
        self.output = "table"
        self.project = "default"
        self.url = ""
        self.token = ""
        self.state = state_directory()
        self.autostart = True
        self._client: Client | None = None

    @classmethod
    def from_environment(cls) -> Session:
        """``CORRAL_STATE``, ``_URL``, ``_TOKEN``, ``_PROJECT``, ``_OUTPUT``, ``_AUTOSTART``."""
        session = cls()
        session.url = os.environ.get("CORRAL_URL", "")
        session.token = os.environ.get("CORRAL_TOKEN", "")
        session.project = os.environ.get("CORRAL_PROJECT") or "default"
        session.output = os.environ.get("CORRAL_OUTPUT") or "table"
        session.autostart = os.environ.get("CORRAL_AUTOSTART", "1") not in ("0", "no", "false")
        return session

    def set_option(self, name: str, value: str) -> None:
        """A flag of the command line. ``--state`` means the local daemon, whatever CORRAL_URL says."""
        if name == "state":
            self.state, self.url = Path(os.path.abspath(value)), ""  # noqa: PTH100 - keeps links as they were written
        else:
            setattr(self, name, value)

    @property
    def client(self) -> Client:
        """The connection. Starts this machine's daemon if none answers (unless that is turned off)."""
        if self._client is None:
            if not self.url:
                self._have_daemon()
            self._client = self.connect()
        return self._client

    def connect(self, *, local: bool = False) -> Client:
        """A connection without starting anything; ``local``: to this machine's daemon, whatever the URL."""
        from corral.client import Client

        if self.url and not local:
            return Client(self.url, token=self.token, project=self.project)
        return Client(state=self.state, project=self.project)

    def _have_daemon(self) -> None:
        if local.listening(self.state):
            return
        if not self.autostart:
            raise Unavailable(
                f"no daemon runs on {self.state}",
                hint="`corral up` starts it (CORRAL_AUTOSTART=0 keeps others from it)",
            )
        if local.start(self.state):
            line(f"started the daemon of {self.state} (`corral down` stops it)")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def list(
        self, kind: str, *, all_projects: bool = False, labels: Iterable[str] = (), phase: str | None = None
    ) -> list[Record]:
        """Objects of a kind, sorted by name; ``labels`` are ``K=V`` words."""
        wanted = pairs(labels, "--label")
        found = self.client.resource(_plural(kind))
        return found.list(all_projects=all_projects, labels=wanted, phase=phase or "")

    def get(self, kind: str, ref: str) -> Record:
        return self.client.resource(_plural(kind)).get(ref)

    def create(
        self, kind: str, *, name: str | None, spec: Mapping[str, Any], labels: Mapping[str, str] | None = None,
        count: int | None = None, timeout_s: float | None = None, dry_run: bool = False,
    ) -> Accepted:  # fmt: skip
        """A new VM, image, template, or something that needs no task."""
        client = self.client
        if kind == "vm":
            return client.vms.begin(spec, name=name, labels=labels, count=count, timeout_s=timeout_s, dry_run=dry_run)
        if kind == "image":
            return client.images.begin(spec, name=name, labels=labels, timeout_s=timeout_s)
        if kind == "template":
            return client.templates.begin(spec, name=name, labels=labels, timeout_s=timeout_s)
        return Accepted([client.resource(_plural(kind)).create(spec, name=name, labels=labels)], [])

    def patch(self, kind: str, ref: str, *, spec: Mapping[str, Any], dry_run: bool = False) -> Record:
        """Change parts of a spec; with ``dry_run`` only what it would be."""
        return self.client.resource(_plural(kind)).patch(ref, spec=spec, dry_run=dry_run)

    def act(self, verb: str, ref: str, *, force: bool = False, timeout_s: float | None = None) -> Record:
        """Ask a VM for start, stop, restart, reset, pause, resume or delete: the task."""
        if verb == "delete":
            return self.client.vms.delete(ref, force=force, wait=False)
        return self.client.vms.power(verb, ref, force=force, timeout_s=timeout_s, wait=False)

    def fork(
        self, ref: str, *, name: str | None, count: int | None, labels: Mapping[str, str], timeout_s: float | None
    ) -> Accepted:
        """Forks of a running VM."""
        return self.client.vms.begin_fork(ref, name=name, count=count, labels=labels, timeout_s=timeout_s)

    def log(self, ref: str, tail: int) -> bytes:
        return self.client.vms.log(ref, tail=tail)

    def follow_log(self, ref: str, tail: int) -> Iterator[bytes]:
        return self.client.vms.follow_log(ref, tail=tail)

    def upload(self, ref: str, content: BinaryIO, size: int, on_bytes: Callable[[int], None]) -> Accepted:
        """The bytes of an image; ``on_bytes`` is told how many have gone so far."""
        return self.client.images.upload(ref, content, length=size, on_bytes=on_bytes)

    def delete(self, kind: str, ref: str) -> None:
        """Delete anything but a VM (that is :meth:`act`)."""
        self.client.resource(_plural(kind)).delete(ref)

    def cancel(self, task: str) -> Record:
        return self.client.tasks.cancel(task)

    def probe(self, host: str) -> Record:
        return self.client.hosts.probe(host)

    def explain(self, ref: str) -> dict[str, Any]:
        return self.client.vms.explain(ref)


def _plural(kind: str) -> str:
    from corral.model.kinds import KINDS  # 20 ms, which `corral run` has no use for

    return KINDS[kind].plural
