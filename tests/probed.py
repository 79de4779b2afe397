"""What this machine's QEMU can do, found out once for a whole run of the tests instead of by each daemon anew.

A probe runs guests for about two seconds. Tests that are about it (tests/integration/test_engine_probe.py), and daemons
of another user, do it themselves: a record of somebody else's probe is not believed.
"""

from __future__ import annotations

import asyncio
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from corral.engine.qemu.probe import probe
from corral.runtime import Runtime


@cache
def _record() -> bytes:
    with tempfile.TemporaryDirectory(prefix="corral-", dir="/tmp") as state, ThreadPoolExecutor(1) as aside:
        Path(state).chmod(0o711)
        aside.submit(asyncio.run, probe(Path(state), Runtime())).result()  # the caller may have a loop of its own
        return (Path(state) / "probe.json").read_bytes()


def as_probed(state: Path) -> None:
    """Have a state directory look as if a daemon had probed the machine there."""
    (state / "probe.json").write_bytes(_record())
