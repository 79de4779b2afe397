"""Having an image here: built, fetched, or found; asked for by several commands at once, or again after a failure."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from corral.cli import failures
from corral.cli.output import Object
from corral.cli.session import Session
from corral.cli.wait import FINAL, Waiting
from corral.client.record import BUILT
from corral.errors import CorralError, NotFound, Refused, TimedOut

REMOVAL_S = 60.0
"""How long the files of a failed image may take to go."""


def ensure_image(session: Session, name: str, *, quiet: bool = False) -> None:
    """Have the image there and ready: build or fetch it if this is the first time. Raises what went wrong.

    ``quiet``: only look whether it could be had. A name that nobody knows is left for the API to refuse, with every
    other problem of the request.
    """
    try:
        found = session.get("image", name)
    except NotFound:
        spec = known_image(session, name)
        if spec is None or quiet:
            return
    else:
        if found["status"]["phase"] == "ready" or quiet:
            return
        spec = known_image(session, name) if found["status"]["phase"] == "error" else dict(found["spec"])
        if spec is None:
            return
    finish(session, *obtain(session, name, spec))


def known_image(session: Session, name: str) -> dict[str, Any] | None:
    """The spec of an image that Corral knows how to get by itself; None for any other name."""
    if name in BUILT:
        return {"source": "build", "recipe": name}
    entries = session.client.images.catalogue()
    return {"source": "catalogue", "recipe": name} if name in {entry["name"] for entry in entries} else None


def obtain(
    session: Session, name: str, spec: dict[str, Any], timeout_s: float | None = None
) -> tuple[Object, list[Object]]:
    """The image and what is still being done for it: asked for now, or by somebody else, or ready already.

    One that failed before is removed and asked for again. Raises Refused ``exists`` if the name means something else.
    """
    try:
        accepted = session.create("image", name=name, spec=spec, timeout_s=timeout_s)
    except Refused as error:
        if error.code != "exists":
            raise
        present = session.get("image", name)
        if any(present["spec"].get(key) != value for key, value in spec.items()):
            raise
        if present["status"]["phase"] == "error":
            failures.line(
                f"{name}: failed before ({present['status'].get('reason') or 'no reason is known'}); once more"
            )
            _remove(session, present)
            return obtain(session, name, spec, timeout_s)
        tasks = [t for t in session.list("task") if t["spec"]["target_id"] == present["meta"]["id"]]
        return present, [t for t in tasks if t["status"]["state"] not in FINAL]
    failures.line(f"{name}: {'building it' if spec['source'] == 'build' else 'fetching it'}")
    return accepted.items[0], list(accepted.tasks)


def finish(session: Session, image: Object, tasks: Iterable[Object]) -> Object:
    """Wait until the image is ready, and give it as it then is. Raises what went wrong."""
    for error in Waiting(session, tasks).run():
        raise error
    found = session.get("image", image["meta"]["id"])
    if found["status"]["phase"] == "error":
        raise CorralError(f"image {found['meta']['name']}: {found['status'].get('reason') or 'it failed'}")
    return found


def _remove(session: Session, image: Object) -> None:
    session.delete("image", image["meta"]["id"])
    until = time.monotonic() + REMOVAL_S
    while time.monotonic() < until:
        try:
            session.get("image", image["meta"]["id"])
        except NotFound:
            return
        time.sleep(0.1)
    raise TimedOut(f"the failed image {image['meta']['name']} could not be removed within {REMOVAL_S:g} s")
