"""One exception tree for the whole platform, and the one table that maps its codes to HTTP and exit status.

    CorralError              what happened, what it means, what to do
    ├── Refused              the caller must change something before trying again
    │   ├── Invalid          the request itself is wrong; carries *every* problem found, each with its field
    │   └── NotFound
    ├── Unavailable          nothing happened, or it is safe to repeat: try later
    │   └── TimedOut         a deadline passed; names the step that was waited for
    ├── Unknown              we cannot tell whether it happened: resolve by reading, never by blind retry
    └── Bug                  an invariant of ours is broken

Library exceptions are wrapped where they enter (one file per library), so that no other type crosses a room's edge.
"""

from __future__ import annotations

import errno
from typing import Any, NamedTuple


class Code(NamedTuple):
    """What a stable error code means to a program: HTTP status, CLI exit status, and a title for people."""

    http: int
    exit: int
    title: str


CODES: dict[str, Code] = {
    "usage": Code(400, 2, "Wrong usage"),
    "malformed": Code(400, 4, "The request cannot be read"),
    "invalid": Code(422, 4, "Some fields are wrong"),
    "denied": Code(403, 4, "Not allowed"),
    "not-found": Code(404, 3, "Not found"),
    "ambiguous": Code(409, 4, "More than one object matches"),
    "exists": Code(409, 4, "The name is taken"),
    "conflict": Code(409, 4, "The object changed meanwhile"),
    "stale": Code(412, 4, "The object changed meanwhile"),
    "in-use": Code(409, 4, "Still in use"),
    "wrong-phase": Code(409, 4, "Not possible in the present phase"),
    "no-capacity": Code(409, 4, "No host can take it"),
    "idempotency": Code(409, 4, "The idempotency key was used for another request"),
    "too-large": Code(413, 4, "Too large"),
    "bad-image": Code(422, 4, "The image cannot be accepted"),
    "unsupported": Code(422, 4, "Not supported here"),
    "cancelled": Code(409, 1, "Cancelled"),
    "failed": Code(500, 1, "It failed"),
    "guest": Code(502, 1, "The guest failed"),
    "engine": Code(502, 1, "The hypervisor failed"),
    "busy": Code(429, 5, "Too many requests"),
    "unavailable": Code(503, 5, "Not available now"),
    "unresponsive": Code(503, 5, "No answer"),
    "timed-out": Code(504, 5, "Timed out"),
    "compacted": Code(410, 5, "That revision is gone: list again"),
    "unknown": Code(500, 1, "The outcome is unknown"),
    "bug": Code(500, 1, "An error in Corral itself"),
}


class CorralError(Exception):
    """Root of the tree. ``code`` is a key of :data:`CODES`; ``message`` one sentence; ``hint`` what to do next."""

    default_code = "failed"

    def __init__(
        self, message: str, *, code: str | None = None, hint: str = "", field: str = "", **details: Any
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        assert self.code in CODES, f"unknown error code {self.code!r}"
        self.message = message
        self.hint = hint
        self.field = field
        self.details: dict[str, Any] = details

    @property
    def http_status(self) -> int:
        return CODES[self.code].http

    @property
    def exit_status(self) -> int:
        return CODES[self.code].exit


class Refused(CorralError):
    """The caller must change something first."""

    default_code = "conflict"


class Problem(NamedTuple):
    """One thing wrong with one field: ``field`` is a path like ``spec.cpu.count``; ``expected`` says what is right."""

    field: str
    message: str
    expected: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" + (f" (expected {self.expected})" if self.expected else "")


class Invalid(Refused):
    """The request is wrong in itself. Holds all problems, never only the first."""

    default_code = "invalid"

    def __init__(self, problems: list[Problem], *, code: str | None = None, hint: str = "") -> None:
        assert problems, "Invalid needs at least one problem"
        super().__init__("; ".join(str(p) for p in problems), code=code, hint=hint, field=problems[0].field)
        self.problems = problems


class NotFound(Refused):
    """No such object (or not visible to the caller)."""

    default_code = "not-found"


class Unavailable(CorralError):
    """Nothing happened, or repeating is safe: try later."""

    default_code = "unavailable"


class TimedOut(Unavailable):
    """A deadline passed. The message names the step that was waited for."""

    default_code = "timed-out"


class Unknown(CorralError):
    """Whether it happened cannot be told. Read the state; never retry blindly."""

    default_code = "unknown"


class Bug(CorralError):
    """An invariant of Corral's own is broken."""

    default_code = "bug"


class WatchLost(Unavailable):
    """A watch can no longer promise that nothing was missed: list again and watch from there."""

    default_code = "compacted"


_SYSTEM_HINTS = {
    errno.ENOSPC: "the disk is full: delete images, templates or VMs that nobody needs",
    errno.EDQUOT: "the disk quota is used up",
    errno.ENOMEM: "this host has no memory left for it",
    errno.EROFS: "the file system is mounted read-only; dmesg says why",
    errno.EACCES: "the daemon's user may not; corral doctor says what it may",
    errno.EPERM: "the daemon's user may not; corral doctor says what it may",
    errno.EMFILE: "the daemon has too many files open",
    errno.EXDEV: "all of the state directory must be on one file system",
}


def from_system(what: str, error: OSError, *, code: str | None = None) -> CorralError:
    """``what`` failed because the system refused something: why, in its own words, and what would help."""
    words = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    return CorralError(f"{what}: {words}{where}", code=code, hint=_SYSTEM_HINTS.get(error.errno or 0, ""))


def from_problem(body: dict[str, Any]) -> CorralError:
    """Rebuild the exception that a problem body (RFC 9457, see :func:`to_problem`) describes."""
    code = body.get("code", "failed")
    code = code if code in CODES else "failed"
    message, hint = str(body.get("detail") or body.get("title") or "unknown error"), str(body.get("hint") or "")
    if body.get("problems"):
        return Invalid([Problem(p["field"], p["message"], p.get("expected", "")) for p in body["problems"]], code=code)
    for cls in (NotFound, TimedOut, WatchLost, Unknown, Bug):
        if code == cls.default_code:
            return cls(message, hint=hint, field=str(body.get("field") or ""))
    family = Unavailable if CODES[code].exit == 5 else Refused if 400 <= CODES[code].http < 500 else CorralError
    return family(message, code=code, hint=hint, field=str(body.get("field") or ""))


def to_problem(error: CorralError) -> dict[str, Any]:
    """The RFC 9457 body of an error: type, title, status, detail, and our code, hint, field, problems."""
    body: dict[str, Any] = {
        "type": f"urn:corral:error:{error.code}",
        "title": CODES[error.code].title,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
    }
    if error.hint:
        body["hint"] = error.hint
    if error.field:
        body["field"] = error.field
    if isinstance(error, Invalid):
        body["problems"] = [p._asdict() for p in error.problems]
    if error.details:
        body["details"] = error.details
    return body
