"""``python -m corral.governor --state DIR``: plans come in on stdin, reports go out on stdout, until stdin ends."""

from __future__ import annotations

import argparse
import os
import select
import sys
from pathlib import Path

import msgspec

from corral.governor.hands import RealHands
from corral.governor.loop import Governor
from corral.governor.meter import nodes, physical
from corral.governor.protocol import Plan
from corral.host import cgroup

PRIORITY = 10
"""SCHED_FIFO: above every guest, below what the kernel needs. It works a few hundred microseconds at a time."""
NICE = -10
MAX_LINE = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="corral-governor")
    parser.add_argument("--state", type=Path, required=True)
    state = parser.parse_args().state
    cpus = sorted(os.sched_getaffinity(0))
    groups = cgroup.choose(state)
    shares = groups if groups.shares else None
    hands = RealHands(cpus, shares)
    mode = groups.describe() if shares else f"nice values and affinity ({groups.describe()})"
    governor = Governor(hands, nodes(cpus), f"{mode}; {_priority()}", physical(cpus))
    try:
        _serve(governor, hands)
    finally:
        governor.release()
        hands.close()


def _priority() -> str:
    """Take priority over guests, as far as this user may; says what was had."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
        return "governor with real-time priority"
    except OSError:
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        return f"governor at nice {NICE}"
    except OSError:
        return "governor without priority"


def _serve(governor: Governor, hands: RealHands) -> None:
    pending = b""
    wait = 0.0
    encoder = msgspec.json.Encoder()
    while True:
        if select.select([0], [], [], wait)[0]:
            piece = os.read(0, 1 << 16)
            if not piece:
                return
            *lines, pending = (pending + piece).split(b"\n")
            assert len(pending) < MAX_LINE, "a plan has no end"
            if lines:  # only the newest counts
                governor.follow(hands.follow(msgspec.json.decode(lines[-1], type=Plan)))
        wait = governor.step()
        if governor.due():
            try:
                sys.stdout.buffer.write(encoder.encode(governor.report()) + b"\n")
                sys.stdout.buffer.flush()
            except BrokenPipeError:
                return


if __name__ == "__main__":
    main()
