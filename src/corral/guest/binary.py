"""Where corral-guest is, the program that images carry so that Corral can talk to their guests."""

from __future__ import annotations

import platform
from pathlib import Path

from corral.errors import Unavailable

DIRECTORY = Path(__file__).parent / "bin"
INSTALLED_AS = "/usr/local/sbin/corral-guest"
"""Where an image recipe puts it; :data:`UNIT` starts it there."""

UNIT = """\
[Unit]
Description=Corral guest agent
# As early as possible: the host waits for its hello. It waits for its port by itself.
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
ConditionVirtualization=vm

[Service]
ExecStart=/usr/local/sbin/corral-guest
Restart=always
RestartSec=1
# Programs that were left in the background outlive the agent.
KillMode=process
LimitMEMLOCK=infinity

[Install]
WantedBy=sysinit.target
"""
"""A systemd unit ``corral-guest.service``; an image enables it by a link in ``sysinit.target.wants``."""


def host_arch() -> str:
    """This machine's architecture in the binaries' names: x86_64, aarch64, riscv64."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def binary(arch: str = "") -> Path:
    """The static binary for guests of ``arch`` (default: the host's). Raises Unavailable when it is not built."""
    path = DIRECTORY / f"corral-guest-{arch or host_arch()}"
    if not path.is_file():
        raise Unavailable(
            f"the guest agent for {arch or host_arch()} has not been built",
            hint="run script/setup (or: python guest-agent/build.py --all)",
        )
    return path
