"""What can be asked of the API, as values: pure, shared by both clients. Transports turn them into HTTP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

Query = Mapping[str, Any]


class Call(NamedTuple):
    """One request. ``repeatable``: sending it twice is the same as once, so a lost connection is simply tried again."""

    method: str
    path: str
    body: Any = None
    headers: Mapping[str, str] = {}
    repeatable: bool = True


def _call(method: str, path: str, query: Query | None = None, body: Any = None, **more: Any) -> Call:
    given = {k: _text(v) for k, v in (query or {}).items() if v is not None and v != "" and v is not False}
    return Call(method, f"/v1/{path}" + (f"?{urlencode(given)}" if given else ""), body, **more)


def _text(value: Any) -> str:
    return "true" if value is True else str(value)


def new_key() -> str:
    """A fresh idempotency key: the request it marks happens once, however often it is sent."""
    return os.urandom(16).hex()


def split(ref: str, project: str) -> tuple[str, str]:
    """``PROJECT/NAME`` as (project, name); a bare reference is in ``project``."""
    scope, _, name = ref.rpartition("/")
    return scope or project, name


def _object(plural: str, ref: str, project: str, rest: str = "") -> tuple[str, dict[str, Any]]:
    scope, name = split(ref, project)
    # "." and ".." are never names, and HTTP libraries would fold them away.
    return f"{plural}/{quote(name, safe='') if name.strip('.') else '%20'}{rest}", {"project": scope}


def listing(
    plural: str, *, project: str = "", all_projects: bool = False, labels: Mapping[str, str] | None = None,
    phase: str = "", name: str = "", limit: int | None = None, cursor: str | None = None,
) -> Call:  # fmt: skip
    query: dict[str, Any] = {"project": project, "all_projects": all_projects, "phase": phase, "name": name}
    call = _call("GET", plural, query | {"limit": limit, "cursor": cursor})
    extra = urlencode([("label", f"{k}={v}") for k, v in (labels or {}).items()])
    joiner = "&" if "?" in call.path else "?"
    return call._replace(path=f"{call.path}{joiner}{extra}") if extra else call


def get(plural: str, ref: str, project: str) -> Call:
    path, query = _object(plural, ref, project)
    return _call("GET", path, query)


def create(
    plural: str, spec: Mapping[str, Any], *, name: str | None = None, project: str = "",
    labels: Mapping[str, str] | None = None, key: str | None = None, dry_run: bool = False, **extra: Any,
) -> Call:  # fmt: skip
    """POST of a new object. ``extra``: ``count`` and ``timeout_s`` of VMs, ``timeout_s`` of images."""
    body: dict[str, Any] = {"spec": dict(spec), **{k: v for k, v in extra.items() if v is not None}}
    if name:
        body["name"] = name
    if project:
        body["project"] = project
    if labels:
        body["labels"] = dict(labels)
    return _call("POST", plural, {"dry_run": dry_run}, body, headers={"Idempotency-Key": key or new_key()})


def patch(
    plural: str, ref: str, project: str, *, spec: Mapping[str, Any] | None, labels: Mapping[str, str | None] | None,
    revision: int | None, dry_run: bool = False,
) -> Call:  # fmt: skip
    path, query = _object(plural, ref, project)
    body = {k: dict(v) for k, v in (("spec", spec), ("labels", labels)) if v is not None}
    headers = {} if revision is None else {"If-Match": f'"{revision}"'}
    return _call("PATCH", path, query | {"dry_run": dry_run}, body, headers=headers, repeatable=revision is None)


def delete(plural: str, ref: str, project: str, *, force: bool = False) -> Call:
    path, query = _object(plural, ref, project)
    return _call("DELETE", path, query | {"force": force})


def power(
    verb: str, ref: str, project: str, *, force: bool, timeout_s: float | None, key: str | None = None
) -> Call:  # fmt: skip
    """start, stop, restart, reset, pause or resume."""
    path, query = _object("vms", ref, project, f"/{verb}")
    body: dict[str, Any] = {"force": force} | ({} if timeout_s is None else {"timeout_s": timeout_s})
    return _call("POST", path, query, body, headers={"Idempotency-Key": key or new_key()})


def fork(
    ref: str, project: str, *, name: str | None, labels: Mapping[str, str] | None, count: int | None,
    timeout_s: float | None, key: str | None = None,
) -> Call:  # fmt: skip
    """Forks of a running VM."""
    path, query = _object("vms", ref, project, "/fork")
    given = {"name": name, "labels": dict(labels) if labels else None, "count": count, "timeout_s": timeout_s}
    body = {field: value for field, value in given.items() if value is not None}
    return _call("POST", path, query, body, headers={"Idempotency-Key": key or new_key()})


def of_vm(what: str, ref: str, project: str, **query: Any) -> Call:
    """GET of log, explain or guest; the paths of console and exec sockets."""
    path, scope = _object("vms", ref, project, f"/{what}")
    return _call("GET", path, scope | query)


def content(ref: str, project: str) -> Call:
    """PUT of an image's bytes; the body is streamed by the transport."""
    path, query = _object("images", ref, project, "/content")
    return _call("PUT", path, query, headers={"Content-Type": "application/octet-stream"}, repeatable=False)


def cancel(task: str) -> Call:
    return _call("POST", f"tasks/{quote(task, safe='')}/cancel")


def probe(host: str) -> Call:
    return _call("POST", f"hosts/{quote(host, safe='')}/probe")


def watch(kinds: tuple[str, ...], *, project: str = "", from_revision: int | None = None, id: str = "") -> Call:
    query = {"kinds": ",".join(kinds), "project": project, "from": from_revision, "id": id}
    return _call("GET", "watch", query)


def plain(what: str) -> Call:
    """GET of version, doctor, schema, usage or catalogue."""
    return _call("GET", what)
