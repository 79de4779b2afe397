"""``python -m corral.server --state DIR``: the daemon, in the foreground; its log goes to stderr."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
from pathlib import Path

from corral.errors import CorralError, Invalid
from corral.runtime import log


def main() -> int:
    """Serve until SIGTERM; the exit status of the error that ended it otherwise."""
    parser = argparse.ArgumentParser(prog="corral.server", description="The daemon of a Corral state directory.")
    parser.add_argument("--state", required=True, type=Path, help="the state directory (CORRAL_STATE)")
    parser.add_argument("--listen", action="append", default=[], metavar="HOST:PORT", help="TCP too; loopback only")
    parser.add_argument("--ready-fd", type=int, help="descriptor that gets a line when the API answers")
    parser.add_argument(
        "--foreground", action="store_true", help="accepted for clarity: it never goes to the background"
    )
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    log.setup(verbose=options.verbose)
    _open_many()
    from corral.server.daemon import home_of, serve

    engine = os.environ.get("CORRAL_ENGINE") or "qemu"
    state = Path(os.path.abspath(options.state))  # noqa: PTH100 - keeps links as they were written
    try:
        if engine not in ("qemu", "fake"):
            raise CorralError(f"CORRAL_ENGINE is {engine[:40]!a}", code="usage", hint="qemu or fake")
        asyncio.run(serve(home_of(state), addresses=tuple(options.listen), engine=engine, ready_fd=options.ready_fd))
    except CorralError as error:
        for text in map(str, error.problems) if isinstance(error, Invalid) else [error.message]:
            sys.stderr.write(f"error: {text}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return error.exit_status
    return 0


def _open_many() -> None:
    """As many open files as this process may have: each VM has some, and each client that holds or watches one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
