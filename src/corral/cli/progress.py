"""Progress on stderr: one line that moves on a terminal; without one, a line for each step."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType

from corral.cli.failures import clean
from corral.cli.output import Object
from corral.units import format_duration, format_size

TICK_S = 0.1
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


WORDS = {
    "turn": "waits its turn", "volume": "making its disk", "seed": "writing its first settings",
    "start": "starting the machine", "boot": "booting", "guest": "waiting for the guest to answer",
    "stop": "asking the guest to power off", "power off": "cutting the power", "delete": "removing what it owned",
    "receive": "receiving",
}  # fmt: skip
"""Steps as people read them; a step that is not here is already a phrase."""


def phrase(step: Object) -> str:
    """A step in words: what it says about itself, or what its name means."""
    name, message = str(step["name"]), str(step.get("message") or "")
    if name in WORDS:
        return clean(message or WORDS[name])
    return clean(f"{name} ({message})" if message else name)


class Moving:
    """One line at the foot of the terminal, redrawn by a thread so that time goes on even when nothing is heard."""

    def __init__(self) -> None:
        self.text = ""
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._frames = _FRAMES if "utf" in (sys.stderr.encoding or "").lower() else "-\\|/"
        self._thread.start()

    def _draw(self) -> None:
        number = 0
        while not self._over.wait(TICK_S):
            if self.text:
                number += 1
                clock = format_duration(time.monotonic() - self._started)
                room = max(20, os.get_terminal_size(2).columns - len(clock) - 5)
                frame = self._frames[number % len(self._frames)]
                sys.stderr.write(f"\r{frame} {self.text[:room]} {clock}\x1b[K")
                sys.stderr.flush()

    def close(self) -> None:
        """Wipe the line."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Shows tasks while they run. A context manager; ``close`` may come early."""

    def __init__(self) -> None:
        self._moving = Moving() if on_terminal() else None
        self._said: set[str] = set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._moving is not None:
            self._moving.close()

    def show(self, task: Object) -> None:
        """A task as it is now."""
        for step in task["status"].get("steps", []):
            if step["state"] != "pending":
                self._step(task, step)
        if self._moving is not None and task["status"].get("progress") is not None:
            self._moving.text += f" {task['status']['progress'] * 100:.0f} %"

    def _step(self, task: Object, step: Object) -> None:
        name = clean(task["spec"].get("target_name") or task["spec"]["target_id"])
        if self._moving is not None:
            self._moving.text = f"{name}: {phrase(step)}"
        elif f"{task['meta']['id']} {step['name']}" not in self._said:
            self._said.add(f"{task['meta']['id']} {step['name']}")
            print(f"{name}: {phrase(step)}", file=sys.stderr, flush=True)


class Transfer:
    """Bytes that go by: on a terminal a moving line, otherwise nothing until the end."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._total, self._done = clean(what), total, 0
        self._moving = Moving() if on_terminal() else None

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._moving is not None:
            self._moving.close()

    def add(self, count: int) -> None:
        """``count`` more bytes."""
        self._done += count
        if self._moving is not None:
            share = f" of {format_size(self._total)}, {self._done * 100 // self._total} %" if self._total else ""
            self._moving.text = f"{self._what}: {format_size(self._done)}{share}"
