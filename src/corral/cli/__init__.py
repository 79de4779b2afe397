"""The commands a person types. Says what happened; decides nothing.

Speaks only to :mod:`corral.client`. A command is loaded when it is typed (:mod:`corral.cli.root` has the table): the
whole process of ``corral list`` should be faster than the eye. Read :mod:`corral.cli.entry` next: how a command ends.
"""

from __future__ import annotations


def main() -> None:
    """The process ``corral``: run its command line and end with its exit status."""
    import gc
    import os

    gc.set_threshold(100_000, 50, 50)  # loading modules makes no garbage worth looking for: a tenth of our start
    from corral.cli.entry import run

    status = run()
    # All is said and flushed. Taking the interpreter apart would cost another tenth, and a thread that still reads a
    # terminal could keep us from ending at all.
    os._exit(status)
