"""Finding this machine's daemon, and starting it in the background when it is not there.

Race-safe: whoever wants to start it takes a lock in the state directory and looks again. The daemon's own lock decides
in the end; a loser's process ends by itself and everybody talks to the winner.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from corral.client.address import SOCKET as SOCKET
from corral.client.address import Address
from corral.errors import CODES, CorralError, Refused, Unavailable

PATIENCE_S = 60.0
"""How long a daemon may take until its API answers: it re-adopts VMs first, on a machine that may be busy."""
LOG = "daemon.log"


def ensure(address: Address) -> None:
    """Have a daemon at this machine's socket; nothing is done for an address elsewhere or with ``CORRAL_AUTOSTART=0``.

    Raises as :func:`start` does.
    """
    if address.socket is None or os.environ.get("CORRAL_AUTOSTART", "1") in ("0", "no", "false"):
        return
    if not listening(address.socket.parent):
        start(address.socket.parent)


def listening(state: Path) -> bool:
    """Somebody accepts connections on the directory's socket. Raises Refused ``denied`` if it is not ours to use."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(5.0)
    try:
        name, directory = Address(state / SOCKET).connectable()
        try:
            probe.connect(name)
        finally:
            if directory is not None:
                os.close(directory)
        return True
    except PermissionError:
        raise Refused(
            f"{state / SOCKET} belongs to another user", code="denied",
            hint="run this as that user, or set CORRAL_STATE to a directory of your own",
        ) from None  # fmt: skip
    except OSError:
        return False
    finally:
        probe.close()


def start(state: Path, extra: tuple[str, ...] = ()) -> bool:
    """Start the daemon of ``state`` and wait until it accepts. False if somebody else's was there first.

    Raises Unavailable with the end of its log when it ends instead, or takes longer than :data:`PATIENCE_S`.
    """
    import fcntl
    import subprocess

    _make(state)
    until = time.monotonic() + PATIENCE_S
    with (state / "autostart.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _sleep_until(until, state)
        if listening(state):
            return False
        log = os.open(state / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            since = os.fstat(log).st_size
            process = subprocess.Popen(
                [sys.executable, "-m", "corral.server", "--state", str(state), *extra],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(log)
        while not listening(state):
            status = process.poll()
            if status is not None and not listening(state):
                raise _ended(state, status, since)
            _sleep_until(until, state)
        process.returncode = 0  # it lives on without us: not a child to be waited for
        return True


def _make(state: Path) -> None:
    """The state directory: 0711, because VM processes of other uids must pass through it."""
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        try:
            state.mkdir(mode=0o711)
            state.chmod(0o711)  # whatever the umask says
        except FileExistsError:
            if not state.is_dir():
                raise
    except OSError as error:
        raise CorralError(
            f"the state directory {state} cannot be made: {error.strerror}",
            hint="set CORRAL_STATE to another directory",
        ) from error
    if not os.access(state, os.W_OK | os.X_OK):
        raise Refused(
            f"the state directory {state} is not yours to write in", code="denied",
            hint="run this as its owner, or set CORRAL_STATE to a directory of your own",
        )  # fmt: skip


def _sleep_until(until: float, state: Path) -> None:
    if time.monotonic() > until:
        raise Unavailable(
            f"the daemon did not answer within {PATIENCE_S:g} s", hint=f"its log is {state / LOG}", log=_tail(state, 0)
        )
    time.sleep(0.02)


def _ended(state: Path, status: int, since: int) -> CorralError:
    """The error of a daemon that ended instead of answering: its own words where it had any."""
    log = _tail(state, since)
    said = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
    if said:
        hints = [line.removeprefix("hint: ") for line in log.splitlines() if line.startswith("hint: ")]
        hint = hints[-1] if hints else f"its log is {state / LOG}"
        code = next((code for code in ("conflict", "failed", "usage") if CODES[code].exit == status), "unavailable")
        return CorralError(f"the daemon did not start: {'; '.join(said)}", code=code, hint=hint)
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return Unavailable(f"the daemon ended at once ({how})", hint=f"its log is {state / LOG}", log=log)


def _tail(state: Path, since: int) -> str:
    """What the daemon said since offset ``since``: its last lines."""
    try:
        with (state / LOG).open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since, end - 4096))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
