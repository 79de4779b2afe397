"""``corral run --each``: a fresh VM for every line of a file, several at once, results in the order of the lines.

Every worker has a connection of its own. What is begun stays within a window behind the oldest line that has not ended,
so that results that wait for their turn are few, however long the file is.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import click

from corral.cli.exec import EXPIRED, FAILED
from corral.cli.failures import clean, messages
from corral.cli.obtain import ensure_image
from corral.cli.session import Session
from corral.cli.throwaway import Copy, Plan, Throwaway, throwaway
from corral.cli.timings import Timings, summarize
from corral.client.record import Record
from corral.errors import CorralError, Invalid, Problem, TimedOut
from corral.units import format_duration

PLACE = "{}"
"""Where the line goes in the program's words; without any it is the program's input."""
AHEAD = 8
"""Runs begun, for each worker, beyond the oldest line whose run has not ended."""
MAX_LINE = 64 << 10
SHOWN = 200
"""Characters of a result's output that a person is shown."""


class Outcome(NamedTuple):
    """How the run of one line ended. ``status``: as that of ``corral run``; ``error``: why, where we ended it."""

    line: str
    status: int
    stdout: bytes
    stderr: bytes
    seconds: float
    error: str = ""

    def as_json(self) -> str:
        texts = {"stdout": self.stdout.decode(errors="replace"), "stderr": self.stderr.decode(errors="replace")}
        row = {"line": self.line, "status": self.status, **texts, "seconds": round(self.seconds, 3)}
        return json.dumps(row | ({"error": self.error} if self.error else {}), ensure_ascii=False)

    def as_text(self) -> str:
        """One line for people: status, seconds, the line, and what came of it."""
        said = self.stdout.decode(errors="replace").strip()
        if self.status:
            said = self.error or self.stderr.decode(errors="replace").strip() or said
        row = f"{self.status:>3}  {self.seconds:6.1f}s  {self.line}  {said}".rstrip()
        return clean(row if len(row) <= SHOWN else f"{row[: SHOWN - 1]}…")


def lines_of(path: str) -> list[str]:
    """The lines of a file, or of stdin for ``-``; empty ones are left out. Raises Invalid."""
    try:
        with click.open_file(path, errors="strict") as file:
            found = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Invalid([Problem("--each", f"{path}: {reason}")], code="usage") from error
    if any(len(line) > MAX_LINE for line in found):
        raise Invalid([Problem("--each", f"{path} has a line of more than {MAX_LINE >> 10} KiB")], code="usage")
    return [line for line in found if line]


def planned_for(plan: Plan, line: str) -> tuple[Plan, bytes]:
    """The plan of one line, and what its program reads."""

    def copies(given: tuple[Copy, ...]) -> tuple[Copy, ...]:
        return tuple(Copy(*(path.replace(PLACE, line) for path in copy)) for copy in given)

    mine = plan._replace(
        argv=tuple(word.replace(PLACE, line) for word in plan.argv), before=copies(plan.before),
        after=copies(plan.after),
    )  # fmt: skip
    return mine, b"" if any(PLACE in word for word in plan.argv) else line.encode() + b"\n"


class Each:
    """All runs of one command. ``jobs`` at once; ``fail_fast``: the first that fails ends all others."""

    def __init__(self, session: Session, plan: Plan, lines: Sequence[str], *, jobs: int, fail_fast: bool) -> None:
        self._session, self._plan, self._lines = session, plan, lines
        self._jobs, self._fail_fast = jobs, fail_fast
        self.timings: list[Timings] = []
        """Of the runs whose VM answered and was deleted, in the order of their ends."""
        self._over = False
        self._open: dict[str, Record] = {}
        self._lock = threading.Lock()

    def run(self, show: Callable[[Outcome], None]) -> int:
        """Run everything; ``show`` gets the outcomes in the order of the lines. 0 if all ended with 0, else 1."""
        waiting: dict[int, Future[Outcome]] = {}
        begun, failed = 0, False
        with ThreadPoolExecutor(self._jobs, thread_name_prefix="each") as pool:
            try:
                for number in range(len(self._lines)):
                    while begun < len(self._lines) and begun - number < self._jobs * AHEAD:
                        waiting[begun] = pool.submit(self._one, self._lines[begun])
                        begun += 1
                    outcome = waiting.pop(number).result()
                    show(outcome)
                    failed = failed or outcome.status != 0
                    if failed and self._fail_fast:
                        break
            finally:
                self._end()
        return int(failed)

    def _end(self) -> None:
        """End what still runs: its VM is deleted, and whoever waits for it hears that."""
        with self._lock:
            self._over = True
            left = list(self._open.values())
        if left:
            from corral.client.sync.sandbox import discard

            client = self._session.connect()
            try:
                for vm in left:
                    discard(client, vm)
            finally:
                client.close()

    def _begun(self, vm: Record) -> None:
        with self._lock:
            if self._over:
                raise CorralError("not run: all are being ended", code="cancelled")
            self._open[vm.id] = vm

    def _one(self, line: str) -> Outcome:
        plan, given = planned_for(self._plan, line)
        began = time.monotonic()
        stages = Timings(began)
        client = self._session.connect()
        vm_ids: list[str] = []

        def known(vm: Record) -> None:
            vm_ids.append(vm.id)
            self._begun(vm)

        try:
            if self._over:
                raise CorralError("not run: all are being ended", code="cancelled")
            with throwaway(self._session, client, plan, stages, begun=known, quiet=True) as one:
                if plan.before or plan.mounts:
                    one.copy_in()
                    stages.mark("copying in")
                outcome = _program(one, plan, line, given)
                stages.mark("the program")
                if plan.after or plan.mounts:
                    one.copy_out()
                    stages.mark("copying out")
            with self._lock:
                self.timings.append(stages)
        except CorralError as error:
            told = error.details.get("status")
            status = told if error.code == "guest" and isinstance(told, int) else FAILED
            outcome = Outcome(line, status, b"", b"", 0.0, "; ".join(messages(error)))
        except OSError as error:
            outcome = Outcome(line, FAILED, b"", b"", 0.0, f"{error.filename or ''}: {error.strerror}".lstrip(": "))
        finally:
            client.close()
            with self._lock:
                for id in vm_ids:
                    self._open.pop(id, None)
        return outcome._replace(seconds=time.monotonic() - began)


def _program(one: Throwaway, plan: Plan, line: str, given: bytes) -> Outcome:
    """What the program of one line did, or that we ended it."""
    with one.program() as program:
        try:
            result = program.collect(given, plan.timeout_s, plan.max_output)
        except TimedOut:
            assert plan.timeout_s is not None, "nothing else is waited for with a limit"
            text = f"{plan.argv[0]} took longer than {format_duration(plan.timeout_s)} and was killed"
            return Outcome(line, EXPIRED, b"", b"", 0.0, text)
    return Outcome(line, result.status, result.stdout, result.stderr, 0.0, _limit(plan, result.limit))


def _limit(plan: Plan, limit: str) -> str:
    if limit == "output":
        return f"{plan.argv[0]} printed too much and was killed"
    return f"{plan.argv[0]} wanted too many processes" if limit else ""


def run_each(session: Session, plan: Plan, path: str, *, jobs: int | None, fail_fast: bool, timings: bool) -> int:
    """The whole command: results on stdout, a bar on a terminal, then the ``timings`` on stderr. The exit status."""
    if plan.interactive or plan.tty or plan.keep or plan.name:
        raise click.UsageError("--each goes with none of -i, -t, --keep and --name")
    if any(not mount.readonly for mount in plan.mounts):
        raise click.UsageError("with --each a mount is read-only (DIR:/GUEST:ro): many would write to one directory")
    lines = lines_of(path)
    each = Each(session, plan, lines, jobs=jobs or os.cpu_count() or 1, fail_fast=fail_fast)
    ensure_image(session, plan.image)  # once, and the daemon is there before many want to start it
    form = Outcome.as_json if session.output == "json" else Outcome.as_text
    with _bar(len(lines)) as (advance, say):
        failed = 0

        def show(outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.status != 0
            say(form(outcome))
            advance(failed)

        status = each.run(show)
    if timings and each.timings:
        summarize(each.timings)
    return status


@contextmanager
def _bar(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """How far it is, at the foot of a terminal: (tell of one more, print a line above it)."""
    out: IO[str] | None = next((f for f in (sys.stdout, sys.stderr) if f.isatty()), None)
    if out is None or os.environ.get("TERM") == "dumb":
        yield (lambda _failed: None), (lambda text: print(text, flush=True))
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=out)
    columns: list[Any] = [
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("", total=total, failed=0)

        def say(text: str) -> None:
            if sys.stdout.isatty():
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)

        yield (lambda failed: progress.update(task, advance=1, failed=failed)), say
