"""Run a program of this machine to its end: bounded in time, output and resources, and never left behind.

The one way in which Corral calls short-lived tools (qemu-img, apt-get, dpkg-deb, mmdebstrap …). Arguments are a list,
never a shell line. The program leads its own process group; a deadline, a cancellation or an error ends the whole group
before the call returns. Limits are set by ``prlimit`` (util-linux): a ``preexec_fn`` would copy our memory map.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from corral.errors import CorralError, Unavailable
from corral.runtime.deadline import deadline

LAST_WORDS = 2048
"""Bytes of stderr that an error shows."""


class Limits(NamedTuple):
    """Resource limits of a program: seconds of CPU, bytes of address space, bytes of any one file it writes."""

    cpu_s: int | None = None
    memory: int | None = None
    file_size: int | None = None

    def wrap(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` under these limits."""
        pairs = (("--cpu", self.cpu_s), ("--as", self.memory), ("--fsize", self.file_size))
        options = [f"{name}={value}:{value}" for name, value in pairs if value is not None]
        return ["prlimit", "--core=0:0", *options, "--", *argv] if options else list(argv)


class Finished(NamedTuple):
    """A program that ended. ``stdout`` is whole; ``stderr`` its tail."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """The end of stderr as text, on one line, for an error message."""
        lines = self.stderr.decode("utf-8", "replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:])[-LAST_WORDS:]


async def run_program(
    argv: Sequence[str | Path],
    *,
    what: str,
    timeout_s: float,
    limits: Limits | None = None,
    max_output: int = 1 << 20,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    on_line: Callable[[str], None] | None = None,
    check: bool = True,
) -> Finished:
    """Run ``argv`` and return its output.

    Args:
        what: names the work in errors, like ``"converting the disk"``.
        max_output: bytes of stdout that are acceptable; more ends the program with an error.
        env: added to a small fixed environment (PATH, HOME, LANG=C); nothing else is inherited.
        on_line: called with each line of stderr as it comes (progress).
        check: a non-zero status raises.

    Raises:
        Unavailable: the program is not installed.
        TimedOut: ``timeout_s`` passed.
        CorralError: code ``failed``, with the program's last words.
    """
    command = [str(part) for part in argv]
    if shutil.which(command[0]) is None:
        raise Unavailable(f"{what}: the program {command[0]} is not installed", hint="run script/setup")
    if limits is not None:
        command = limits.wrap(command)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env=_environment(env),
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with deadline(timeout_s, what), asyncio.TaskGroup() as group:
            out = group.create_task(_collect(process.stdout, max_output))
            err = group.create_task(_tail(process.stderr, on_line))
            status = await process.wait()
    finally:
        await _end(process)
    stdout = out.result()
    finished = Finished(status, stdout or b"", err.result())
    if stdout is None:
        raise CorralError(f"{what}: {command[0]} printed more than {max_output} bytes")
    if check and status != 0:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise CorralError(f"{what} failed ({Path(str(argv[0])).name}, {how}): {finished.last_words or 'no message'}")
    return finished


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """What every program gets: no surprises from the caller's locale, but the machine's proxies and certificates."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = os.environ.get("PATH", "/usr/bin:/bin")
    return {**kept, "PATH": f"{path}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8", **(extra or {})}


_INHERITED = (
    "HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE",
)  # fmt: skip


async def _collect(stream: asyncio.StreamReader, limit: int) -> bytes | None:
    """All of a stream, or None when it is longer than ``limit`` (then it is read to its end and dropped)."""
    parts: list[bytes] = []
    total = 0
    while piece := await stream.read(65536):
        total += len(piece)
        if total <= limit:
            parts.append(piece)
    return b"".join(parts) if total <= limit else None


async def _tail(stream: asyncio.StreamReader, on_line: Callable[[str], None] | None) -> bytes:
    """The last bytes of a stream; complete lines (ended by LF or CR) go to ``on_line`` on the way."""
    tail, pending = b"", b""
    while piece := await stream.read(65536):
        tail = (tail + piece)[-LAST_WORDS:]
        if on_line is not None:
            *lines, pending = (pending + piece).replace(b"\r", b"\n").split(b"\n")
            pending = pending[-LAST_WORDS:]
            for line in lines:
                on_line(line.decode("utf-8", "replace"))
    return tail


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill whatever is left of the program's group, and reap it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the whole group has ended
    except PermissionError:
        process.kill()  # members run as other users (user namespaces): its parent's end takes them along
    await process.wait()
