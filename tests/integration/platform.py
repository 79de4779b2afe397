"""A whole Corral of its own for a test: a state directory, a daemon, and the command line as a person types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from corral.agent.settings import Settings
from tests.probed import as_probed

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("CORRAL_CACHE") or REPOSITORY / ".cache")
CORRAL = Path(sys.executable).parent / "corral"
FORKS = int(os.environ.get("CORRAL_TEST_FORKS", "10"))
"""How many forks at once the tests of many make."""


class Platform:
    """One state directory and its daemon. Use as a context manager: everything it started is gone afterwards.

    ``settings``: the agent's, where they are not the usual ones.
    """

    def __init__(
        self,
        *,
        engine: str = "qemu",
        env: dict[str, str] | None = None,
        prefix: list[str] | None = None,
        parent: Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="corral-test-", dir=parent or "/tmp"))
        self.state.chmod(0o711)
        if engine == "qemu":
            as_probed(self.state)
        if settings is not None:
            usual = Settings()._asdict()
            other = {name: value for name, value in settings._asdict().items() if value != usual[name]}
            (self.state / "agent.toml").write_text("".join(f"{name} = {value}\n" for name, value in other.items()))
        self.prefix = prefix or []
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("CORRAL_")},
            "CORRAL_STATE": str(self.state), "CORRAL_CACHE": str(CACHE), "CORRAL_AUTOSTART": "0", "CORRAL_TEMPLATES": "off",
            "CORRAL_ENGINE": engine, "NO_COLOR": "1", "PYTHONWARNINGS": "error::ResourceWarning", **(env or {}),
        }  # fmt: skip

    def __enter__(self) -> Platform:
        return self

    def __exit__(self, *exc: object) -> None:
        self.run("down", "--all", check=False, timeout=60)
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.state, ignore_errors=True)

    def popen(self, *arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self.prefix, str(CORRAL), *arguments], env={**self.env, **(env or {})}, **options)

    def run(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = 120,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """``corral ARGUMENTS…``; with ``check`` a failure shows what was printed."""
        done = subprocess.run(
            [*self.prefix, str(CORRAL), *arguments], input=stdin, capture_output=True, timeout=timeout,
            env={**self.env, **(env or {})}, check=False,
        )  # fmt: skip
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        if check and done.returncode:
            raise AssertionError(
                f"corral {' '.join(arguments)} exited {done.returncode}\n{done.stdout[-2000:].decode()}\n"
                f"{done.stderr[-2000:].decode()}\n--- daemon.log ---\n{self.log()[-4000:]}"
            )
        return done

    def text(self, *arguments: str, **options: Any) -> str:
        return self.run(*arguments, **options).stdout.decode()

    def json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self.run(*arguments, "-o", "json", **options).stdout)

    def up(self, **env: str) -> int:
        """Start the daemon; its pid."""
        self.run("up", env=env)
        return self.pid()

    def pid(self) -> int:
        return int(self.json("version")["pid"])

    def kill(self) -> None:
        """SIGKILL the daemon and wait until it is gone."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), 10, "the daemon to be gone")

    def killed_at(self, point: str, *command: str, within: float = 30) -> None:
        """See the daemon, which ``CORRAL_KILL_AT`` has to kill itself at ``point``, do so when it is given the command.

        The command is ended then: left to itself it would wait for another daemon, and say again what it wants.
        """
        pid = self.pid()
        with tempfile.TemporaryFile() as said:
            asking = self.popen(*command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            try:
                wait_until(lambda: not alive(pid), within, f"the daemon to be killed at {point}")
            except AssertionError as error:
                said.seek(0)
                error.add_note(
                    f"corral {' '.join(command)}: {said.read().decode()}\n--- daemon.log ---\n{self.log()[-4000:]}"
                )
                raise
            finally:
                asking.kill()
                asking.wait()

    def vm(self, name: str) -> dict[str, Any]:
        return dict(self.json("info", name))

    def phase(self, name: str) -> str:
        return str(self.vm(name)["status"]["phase"])

    def log(self) -> str:
        path = self.state / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self) -> list[int]:
        """Every process that works in this state directory: the daemon, QEMUs, anything left."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                where = os.readlink(entry / "cwd")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if command and (where.startswith(str(self.state)) or str(self.state).encode() in command):
                found.append(int(entry.name))
        return found

    def qemus(self) -> list[int]:
        return [pid for pid in self.processes() if b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def assert_nothing_left(self) -> None:
        """No VM, volume, open task, QEMU or VM directory is left (the daemon still runs)."""
        assert self.json("list") == []
        assert self.json("volume", "list") == []
        open_tasks = [t for t in self.json("task", "list") if t["status"]["state"] in ("pending", "running")]
        assert open_tasks == []
        wait_until(lambda: not self.qemus(), 10, "every QEMU to be gone")
        left = list((self.state / "vms").glob("*")) if (self.state / "vms").exists() else []
        assert left == []


def alive(pid: int) -> bool:
    """The process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float, what: str, every: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(every)
