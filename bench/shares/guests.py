"""Guests of a platform of their own, and the program that they run (guest/load.c)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.platform import Platform

from shares.measure import Guest

SOURCE = Path(__file__).resolve().parents[1] / "guest" / "load.c"


def build(where: Path) -> Path:
    """The static program for guests."""
    program = where / "load"
    subprocess.run(
        [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl", "-static", "-O2", "-s",
         "-o", str(program), str(SOURCE)], check=True,
    )  # fmt: skip
    return program


def run(platform: Platform, guest: Guest, program: str) -> None:
    """Have a guest run ``load PROGRAM`` from now on, whatever becomes of the daemon."""
    platform.run("exec", guest.name, "--", "sh", "-c", f"setsid /load {program} >/dev/null 2>&1 </dev/null &")


@contextmanager
def fleet(platform: Platform, programs: list[str], cpus: list[int] | None = None) -> Iterator[list[Guest]]:
    """One guest for each program, gone afterwards; an empty program leaves it idle, two CPUs run it twice."""
    guests = []
    counts = cpus or [1] * len(programs)
    names = [f"v-{number + 1}" for number in range(len(programs))]
    try:
        for name, count in zip(names, counts, strict=True):
            platform.run("launch", "micro", "--name", name, "--memory", "96M", "--cpus", str(count), timeout=300)
            record = platform.vm(name)
            guests.append(Guest(name, record["status"]["pid"], record["meta"]["id"], count))
        with tempfile.TemporaryDirectory() as where:
            program = build(Path(where))
            for guest in guests:
                platform.run("cp", str(program), f"{guest.name}:/load")
                platform.run("exec", guest.name, "--", "chmod", "+x", "/load")
        for guest, text in zip(guests, programs, strict=True):
            for _ in range(guest.cpus if text else 0):
                run(platform, guest, text)
        yield guests
    finally:
        platform.run("up", check=False)
        platform.run("delete", "--force", *names, timeout=120, check=False)
