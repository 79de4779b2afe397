"""A part of systemd's hierarchy that is ours: a transient service whose groups systemd leaves alone (``Delegate=yes``).

Where systemd runs it owns cgroup version 2: what others make in it may be reset at its next reload. So it is asked for
a service, which needs a process that lives; that one sleeps, in a group of its own, because a group that hands
controllers down holds no processes itself. The service outlives the daemon as VMs do, and is found again by its name.
``systemctl stop NAME`` ends it, and the VMs in it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from corral.errors import CorralError
from corral.host.cgroup import files

RUNNING = Path("/run/systemd/system")
"""Exists where systemd is the init system (sd_booted(3))."""
DEADLINE_S = 15.0
KEEPER = "keeper"


def delegated(root: Path, name: str, weight: int) -> Path:
    """The group of a service of this name, which it is made for if it is not there.

    Args:
        root: where version 2 is mounted.
        weight: of all that is in it, against others of machine.slice.

    Raises CorralError when systemd does not give one.
    """
    unit = f"{name}.service"
    group = _group(unit)
    if not group:
        _run(
            "systemd-run", "--quiet", "--collect", f"--unit={unit}", "--slice=machine.slice", "--service-type=exec",
            "--description=Virtual machines of Corral", "--property=Delegate=yes", f"--property=CPUWeight={weight}",
            "sleep", "infinity",
        )  # fmt: skip
        group = _group(unit)
    path = root / group.lstrip("/")
    if not group or not (path / "cgroup.procs").exists():
        raise CorralError(f"systemd gave {unit} no control group in {root}", code="engine")
    keeper = files.make(path / KEEPER)
    for pid in (path / "cgroup.procs").read_text().split():
        files.write(keeper / "cgroup.procs", pid)
    return path


def _group(unit: str) -> str:
    """Its control group, from the root of the hierarchy; empty when it does not run."""
    return _run("systemctl", "show", "--property=ControlGroup", "--value", unit).strip()


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CorralError(f"{command[0]} did not answer: {error}", code="engine") from error
    if done.returncode:
        why = done.stderr.strip() or f"exit status {done.returncode}"
        raise CorralError(f"{command[0]} refused: {why}", code="engine")
    return done.stdout
