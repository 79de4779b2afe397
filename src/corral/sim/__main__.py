"""Play seeds, say what broke: ``python -m corral.sim run --seed N|--seeds A..B [--log FILE]``, ``replay --seed N``."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

from corral.sim.scenario import run

SHOWN = 5
"""Broken invariants in a seed's line; the story has them all. Usually the first explains the others."""

STUCK_S = 120.0
"""Real time for one seed; usually it takes a tenth of a second."""


def _seeds(text: str) -> range:
    first, _, last = text.partition("..")
    return range(int(first), int(last or first) + 1)


def main(arguments: list[str]) -> int:
    """0 when every invariant held, else 1."""
    parser = argparse.ArgumentParser(prog="python -m corral.sim", description="Play seeds in virtual time.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    play = verbs.add_parser("run", help="play seeds; one line each: seed, digest, faults, what broke")
    which = play.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int)
    which.add_argument("--seeds", type=_seeds, metavar="A..B")
    play.add_argument("--log", type=Path, metavar="FILE", help="write the whole story of each seed")
    again = verbs.add_parser("replay", help="print the whole story of one seed")
    again.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)
    broken = 0
    stories = []
    for seed in [options.seed] if options.seed is not None else options.seeds:
        # Code that never awaits stops virtual time itself: say where it spins instead of hanging.
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        outcome = run(seed)
        faulthandler.cancel_dump_traceback_later()
        broken += bool(outcome.broken)
        if options.verb == "replay":
            sys.stdout.write(outcome.story)
        verdict = "; ".join(outcome.broken[:SHOWN]) or "ok"
        sys.stdout.write(f"seed {seed} {outcome.digest} faults={outcome.faults} {verdict}\n")
        sys.stdout.flush()
        if options.verb == "run" and options.log is not None:
            stories.append(f"=== seed {seed}\n{outcome.story}")
    if stories:
        options.log.write_text("".join(stories))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
