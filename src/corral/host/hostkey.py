"""SSH host keys for guests, made on the host: on an emulated CPU it takes seconds, here milliseconds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from corral.runtime.program import run_program

DEADLINE_S = 20.0
"""Milliseconds, but for a host that is very busy."""


class HostKey(NamedTuple):
    """An ed25519 key: the private part in OpenSSH's format, the public one as its line."""

    private: bytes
    public: bytes


async def host_key() -> HostKey:
    """A fresh one. Raises Unavailable where there is no ssh-keygen."""
    directory = Path(tempfile.mkdtemp(prefix="corral-key-"))  # 0700
    try:
        path = directory / "key"
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
        await run_program(argv, what="making a host key", timeout_s=DEADLINE_S)
        return HostKey(path.read_bytes(), path.with_suffix(".pub").read_bytes())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
