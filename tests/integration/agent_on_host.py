"""corral-guest on this machine instead of in a guest: the real binary behind a unix socket, told to only pretend."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from corral.guest.protocol import Command, Ended, Guest
from corral.guest.resident import Resident, open_resident
from corral.runtime import Runtime
from corral.runtime.sockets import reachable

AGENT = Path(__file__).parents[2] / "guest-agent"


@cache
def build_script() -> ModuleType:
    """guest-agent/build.py as a module."""
    spec = importlib.util.spec_from_file_location("guest_agent_build", AGENT / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def built() -> Path:
    """The binary for this machine, built if need be."""
    script = build_script()
    (path,) = script.build(script.AGENT)
    assert isinstance(path, Path)
    return path


@cache
def sanitized() -> Path | None:
    """The agent with address and undefined-behaviour sanitizers; None when no compiler here can do that."""
    out = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp")) / "corral-guest"
    sources = [str(path) for path in sorted((AGENT / "src").glob("*.c"))]
    for compiler in ("gcc", "clang"):
        if not shutil.which(compiler):
            continue
        flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        done = subprocess.run([compiler, *flags, "-o", str(out), *sources], capture_output=True, check=False)
        if done.returncode == 0:
            return out
    return None


@dataclass
class Agent:
    """A running agent and where to reach it."""

    process: subprocess.Popen[bytes]
    ours: socket.socket
    """Our end of its connection, for tests that speak raw bytes."""

    def memory(self) -> int:
        """Resident bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the agent is gone")

    def stop(self) -> int:
        """Hang up; its exit status."""
        self.ours.close()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start_agent(binary: Path) -> Agent:
    """An agent on one end of a socket pair."""
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen(
            [str(binary), "--pretend", "--socket-fd", str(its.fileno())],
            pass_fds=[its.fileno()],
            stderr=subprocess.PIPE,
        )
    return Agent(process, ours)


@asynccontextmanager
async def speaking(agent: Agent) -> AsyncIterator[Resident]:
    """A speaker on the agent's socket pair; the agent stays when the block ends, as it does in a guest."""
    reader, writer = await asyncio.open_connection(sock=agent.ours.dup())
    guest = Resident(reader, writer, Runtime())
    try:
        async with asyncio.timeout(10):
            await guest.greet()
        yield guest
    finally:
        await guest.close()


@asynccontextmanager
async def guest_at_path(path: Path, binary: Path) -> AsyncIterator[tuple[Resident, Agent]]:
    """As in production: connect to a listening unix socket and let the agent come later."""
    with socket.socket(socket.AF_UNIX) as listener:
        with reachable(path) as name:
            listener.bind(name)
        listener.listen(1)
        listener.setblocking(False)
        opening = asyncio.ensure_future(open_resident(path, Runtime(), timeout=10))
        its, _ = await asyncio.get_running_loop().sock_accept(listener)
        with its:
            process = subprocess.Popen(
                [str(binary), "--pretend", "--socket-fd", str(its.fileno())], pass_fds=[its.fileno()]
            )
            agent = Agent(process, its)
            guest = await opening
        try:
            yield guest, agent
        finally:
            await guest.close()
            assert agent.stop() == 0


async def run(guest: Guest, *argv: str, stdin: bytes = b"", **options: object) -> tuple[int, bytes, bytes]:
    """A program's status, stdout and stderr; stdin is written beside reading, then ended."""
    process = await guest.run(Command(argv=argv, **options))  # type: ignore[arg-type]
    streams: dict[int, list[bytes]] = {1: [], 2: []}
    status = -1

    async def feed() -> None:
        await process.write(stdin)
        await process.eof()

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(feed())
            async for item in process.output():
                if isinstance(item, Ended):
                    status = item.status
                else:
                    streams[item.stream].append(item.data)
    finally:
        await process.close()
    return status, b"".join(streams[1]), b"".join(streams[2])
