"""Downloads: bounded in size and time, resumed where they broke off, verified before anybody looks inside.

A download lives in two files: ``<key>.part`` and ``<key>.json`` (the validator that says whether a rest belongs to it).
A killed daemon finds both and goes on. :mod:`corral.images.http` says which servers may be asked at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Literal

import msgspec

from corral.errors import CorralError, Refused, Unavailable
from corral.images.files import Progress
from corral.images.http import Answer, Http
from corral.runtime import Runtime, deadline
from corral.units import GIB, MIB, format_size

MAX_DOWNLOAD = 32 * GIB
DOWNLOAD_TIMEOUT_S = 4 * 3600.0
ATTEMPTS = 6
"""In a row without a single byte gained."""
_RESERVE = GIB
"""Disk space that a download leaves free."""
_TEXT_LIMIT = MIB
_CHECKSUM = re.compile(r"(sha256):([0-9a-f]{64})|(sha512):([0-9a-f]{128})", re.ASCII)


class Checksum(msgspec.Struct, frozen=True):
    """What a file must hash to."""

    kind: Literal["sha256", "sha512"]
    value: str

    @classmethod
    def parse(cls, text: str) -> Checksum:
        """Of ``sha256:…`` or ``sha512:…``. Raises Refused."""
        found = _CHECKSUM.fullmatch(text.strip().lower())
        if found is None:
            raise Refused("a checksum looks like sha256:… or sha512:…", code="invalid", field="checksum")
        return cls("sha256", found[2]) if found[1] else cls("sha512", found[4])

    def matches(self, path: Path) -> bool:
        """Whether the file has this checksum. Blocking."""
        with path.open("rb") as file:
            return hashlib.file_digest(file, self.kind).hexdigest() == self.value


class _Note(msgspec.Struct):
    """What is known of the file at the other end."""

    url: str
    validator: str = ""
    total: int = 0


class Fetcher:
    """Downloads into ``directory``."""

    def __init__(
        self, directory: Path, rt: Runtime, *, allow_loopback: bool = False, max_bytes: int = MAX_DOWNLOAD
    ) -> None:
        self._directory, self._rt, self._max = directory, rt, max_bytes
        self._http = Http(allow_loopback=allow_loopback)

    async def fetch(self, url: str, checksum: Checksum | None, progress: Progress) -> Path:
        """Have the content of ``url`` as a file of ours; the caller removes it (:meth:`forget`) when it is used.

        Raises:
            Refused: URL not allowed (``denied``), not there (``not-found``), too large, checksum wrong (``bad-image``).
            Unavailable: the server did not deliver; what has arrived is kept and the next call goes on.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        part, note = self._paths(url, checksum)
        async with deadline(DOWNLOAD_TIMEOUT_S, "the download"):
            await self._complete(url, part, note, checksum is not None, progress)
        if checksum is not None:
            progress("checking the checksum", 0, 0)
            if not await asyncio.to_thread(checksum.matches, part):
                self.forget(part)
                raise Refused(
                    f"the file at {url} does not have the stated {checksum.kind} checksum",
                    code="bad-image",
                    hint="it changed, or the transfer was tampered with; what came was thrown away",
                )
        return part

    async def text(self, url: str) -> str:
        """A small text (a checksum list). Raises like :meth:`fetch`."""
        async with deadline(60, f"fetching {url}"), self._http.get(url) as answer:
            _expect(answer, url, (200,))
            content = b""
            async for piece in answer.pieces():
                content += piece
                if len(content) > _TEXT_LIMIT:
                    raise Refused(f"{url} is larger than {format_size(_TEXT_LIMIT)}", code="too-large")
        return content.decode("utf-8", "replace")

    def forget(self, part: Path) -> None:
        """Remove a download and what was noted of it."""
        part.unlink(missing_ok=True)
        part.with_suffix(".json").unlink(missing_ok=True)

    def _paths(self, url: str, checksum: Checksum | None) -> tuple[Path, Path]:
        key = hashlib.sha256(f"{url}\0{checksum.value if checksum else ''}".encode()).hexdigest()[:32]
        return self._directory / f"{key}.part", self._directory / f"{key}.json"

    async def _complete(self, url: str, part: Path, note: Path, verified: bool, progress: Progress) -> None:
        """Ask again and again until everything is here; give up after some attempts that brought nothing."""
        fruitless = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                await self._once(url, part, note, verified, progress)
                return
            except Unavailable as error:
                gained = part.exists() and part.stat().st_size > before
                fruitless = 0 if gained else fruitless + 1
                if fruitless >= ATTEMPTS:
                    raise Unavailable(
                        error.message, hint="what has arrived is kept; the next try goes on there"
                    ) from error
            await self._rt.clock.sleep(self._rt.random.uniform(0.5, 1.0) * min(30.0, 0.2 * 2**fruitless))

    async def _once(self, url: str, part: Path, note: Path, verified: bool, progress: Progress) -> None:
        """One request: the rest of the file, or all of it."""
        known = _read_note(note)
        have = part.stat().st_size if part.exists() else 0
        if known.url != url or not (known.validator or verified):
            have = 0
        if have and known.total == have:
            return
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and known.validator:
            headers["If-Range"] = known.validator
        async with self._http.get(url, headers) as answer:
            if answer.status == 416:  # what we have is not a beginning of what is there now
                self.forget(part)
                raise Unavailable("the file changed at its server")
            _expect(answer, url, (200, 206))
            start, total = _extent(answer)
            if start != have and start != 0:
                raise Unavailable("the server sent another part than was asked for")
            self._check_room(total, start)
            note.write_bytes(msgspec.json.encode(_Note(url=url, validator=_validator(answer), total=total)))
            await self._store(answer, part, start, total, progress)

    async def _store(self, answer: Answer, part: Path, start: int, total: int, progress: Progress) -> None:
        with part.open("r+b" if part.exists() else "xb") as file:
            file.truncate(start)
            file.seek(start)
            done = start
            progress("downloading", done, total)
            async for piece in answer.pieces():
                done += len(piece)
                if done > self._max:
                    self.forget(part)
                    raise Refused(f"the file is larger than {format_size(self._max)}", code="too-large")
                file.write(piece)
                progress("downloading", done, total)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        if total and done != total:
            raise Unavailable(f"the download broke off after {done} of {total} bytes")
        if not total:
            note = part.with_suffix(".json")
            note.write_bytes(msgspec.json.encode(msgspec.structs.replace(_read_note(note), total=done)))

    def _check_room(self, total: int, have: int) -> None:
        if total > self._max:
            raise Refused(f"the file has {format_size(total)}; at most {format_size(self._max)}", code="too-large")
        free = shutil.disk_usage(self._directory).free
        if total - have > free - _RESERVE:
            needed = format_size(max(0, total - have))
            raise CorralError(f"the download needs {needed} and {format_size(free)} are free", code="unavailable")


def _read_note(note: Path) -> _Note:
    try:
        return msgspec.json.decode(note.read_bytes(), type=_Note)
    except (FileNotFoundError, msgspec.DecodeError):
        return _Note(url="")


def _expect(answer: Answer, url: str, statuses: tuple[int, ...]) -> None:
    if answer.status in statuses:
        return
    if answer.status in (401, 403, 404, 410):
        raise Refused(f"{url} is not there (HTTP {answer.status})", code="not-found", field="url")
    raise Unavailable(f"{url}: the server answers HTTP {answer.status}")


def _extent(answer: Answer) -> tuple[int, int]:
    """First byte of the answer's body in the whole, and the whole's size (0: not told)."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", answer.header("content-range"))
        if found is None:
            raise Unavailable("the server does not say which part it sent")
        return int(found[1]), 0 if found[2] == "*" else int(found[2])
    length = answer.header("content-length")
    return 0, int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0


def _validator(answer: Answer) -> str:
    """What makes a later Range request safe: a strong ETag, or the date."""
    etag = answer.header("etag")
    return etag if etag and not etag.startswith("W/") else answer.header("last-modified")
