"""Forks in numbers: a burst of launches, templates of several sizes, many forks alive at once."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers.started import Started, anonymous, children_cpu

import corral.sync
from forks.measure import MIB, high, middle, table
from forks.platforms import Forks, forks

LONG_S = 900
REST_S = 15.0
"""What a guest's services do when they wake is over by then."""
ASKED_AT_ONCE = 2
AT_ONCE = 100
"""As many as one request may ask for."""


def rate(image: str, memory: str, count: int) -> dict[str, Any]:
    """Forks a second of ``corral launch --count``, from the start of the command to its end: each has its identity."""
    with forks(image) as one:
        one.template(memory)
        one.ready()
        one.settle()
        spent = one.cpu()
        took, own = _burst(one, memory, count)
        cpu = one.cpu() - spent + own
        time.sleep(REST_S)
        later = one.cpu() - spent + own
        marks = [vm.status["details"]["start"]["timings"]["identity"] for vm in one.client.vms.list()]
    print(
        f"{count} forks in {took:.1f} s: {count / took:.2f} a second; CPU {cpu / count:.2f} s each, "
        f"{later / count:.2f} s each {REST_S:g} s later; half were somebody after {statistics.median(marks):.1f} s"
    )
    return {"count": count, "seconds": took, "forks_s": count / took, "cpu_s": cpu / count, "cpu_later_s": later / count, "identity_s": sorted(marks)}  # fmt: skip


def live(image: str, memory: str, count: int) -> dict[str, Any]:
    """So many at once: each runs and says its name; what each holds of its own, and all together."""
    with forks(image) as one:
        one.template(memory)
        one.ready()
        one.settle()
        free = _available()
        took, _ = _burst(one, memory, count)
        time.sleep(REST_S)
        taken = free - _available()
        vms = one.client.vms.list()
        owned = [anonymous(vm.status["pid"]) for vm in vms]
        wrong = [f"{vm.name} is {vm.phase}: {vm.status['reason']}" for vm in vms if vm.phase != "running"]
        began = time.monotonic()
        wrong += _asked(one, [vm.name for vm in vms])
        asked = time.monotonic() - began
        spent = one.cpu()
        time.sleep(REST_S)
        idle = (one.cpu() - spent) / REST_S / count
    print(
        f"{count} forks of {memory} alive after {took:.1f} s ({count / took:.2f} a second)\n"
        f"own memory of each: {statistics.median(owned) / MIB:.0f} MiB, at most {max(owned) / MIB:.0f}; the host has "
        f"{taken / MIB:.0f} MiB less available, {taken / MIB / count:.0f} for each\n"
        f"each asked for its name, {ASKED_AT_ONCE} at once: {count - len(wrong)} said it, in {asked:.1f} s\n"
        f"at rest each takes {idle:.2%} of a core"
    )
    for row in wrong:
        print(f"  {row}")
    return {
        "count": count, "seconds": took, "own": sorted(owned), "taken": taken, "wrong": wrong, "idle_cores": idle
    }  # fmt: skip


def sizes(image: str, memories: Sequence[str], runs: int) -> dict[str, Any]:
    """Forks of templates of several sizes in turn; how much longer the slowest take than the quickest."""
    found: dict[str, list[Started]] = {memory: [] for memory in memories}
    with forks(image) as one:
        for memory in memories:
            one.template(memory)
        one.ready()
        for number in range(runs + 1):
            for memory in memories:
                one.settle()
                vm, started = one.start(memory, name="one")
                vm.delete(force=True)
                if number:  # the first of each warms caches
                    found[memory].append(started)
    rows = [["memory", "forks", "answers s", "p90", "identity s", "p90", "own MiB"]]
    medians: dict[str, list[float]] = {"answer": [], "identity": []}
    for memory, ones in found.items():
        row = [memory, str(len(ones))]
        for field, kept in medians.items():
            values = [getattr(one, field) for one in ones]
            kept.append(statistics.median(values))
            row += [f"{middle(values):.3f}", f"{high(values):.3f}"]
        rows.append([*row, f"{statistics.median(one.own or 0 for one in ones) / MIB:.0f}"])
    table(rows)
    ratios = {field: max(values) / min(values) for field, values in medians.items()}
    print("the slowest size by the quickest: " + ", ".join(f"{field} {ratio:.2f}" for field, ratio in ratios.items()))
    return {
        "ratios": ratios,
        "sizes": {
            memory: [dict(zip(Started._fields, one, strict=True)) for one in ones] for memory, ones in found.items()
        },
    }


def _burst(one: Forks, memory: str, count: int) -> tuple[float, float]:
    """``corral launch --count``, as few as may be: seconds from the first's start to the last's end, and their own CPU
    seconds."""
    own, began = children_cpu(), time.monotonic()
    for done in range(0, count, AT_ONCE):
        part = str(min(AT_ONCE, count - done))
        options = ["--name", f"from-{done}", "--count", part, "--memory", memory, "--timeout", f"{LONG_S}s"]
        one.platform.run("launch", one.image, *options, timeout=LONG_S + 20)
    took = time.monotonic() - began
    print(f"{count} launched in {took:.1f} s", file=sys.stderr, flush=True)
    return took, children_cpu() - own


def _asked(one: Forks, names: list[str]) -> list[str]:
    """Have each VM say its name; those that did not, and what they said."""
    mine = threading.local()

    def ask(name: str) -> str:
        if not hasattr(mine, "client"):
            mine.client = corral.sync.Client(state=one.platform.state)
        said = mine.client.vms.run(name, "hostname", timeout=60).text.strip()
        return "" if said == name else f"{name} calls itself {said!r}"

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [row for row in pool.map(ask, names) if row]


def _available() -> int:
    """Bytes of memory that the host has left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel tells of it")
