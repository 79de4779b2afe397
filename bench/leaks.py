"""What many throw-away VMs leave behind: nothing. Counts everything a run makes, before and after N real `corral run micro -- true`.

Method. A daemon of its own with templates on (and no warm pool: its guests come and go with use); a first run boots and leaves its template, a few more warm up. Then what there is of this state directory is counted: its
processes, their open files (memfds by themselves), threads and network namespaces; unix sockets; files; control groups; mounts; named network namespaces of the host; the
store's keys; and the daemon's memory. Half of the runs come one after the other, half some at once (`run --each`). What is deleted has a moment to go, then all is counted
again. A count that grew is printed with what is new, and the exit status is 1. Tasks, events and the store's history grow to their limits (they tell what was); the
daemon's memory is shown, and fails beyond 4 MiB and 64 KiB for each of the first 1,000 runs. A traceback in the daemon's log fails too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.integration.platform import CORRAL, Platform, wait_until

RECORDS = ("/tasks/", "/events/", "/idempotency/")
GROWTH, WARM, FULL = 64 << 10, 4 << 20, 1000
"""Bytes a run, for its records and the store's history; once, for what is loaded late; runs after which those are full."""
SETTLE_S = 90.0
POOL = min(32, (os.cpu_count() or 1) + 4) + 1
"""Threads that a process of asyncio has after a while, and then for good: its main one and the workers."""


def links(pid: int, folder: str) -> list[str]:
    """Where the links in a folder of /proc/PID point."""
    found = []
    try:
        for entry in Path(f"/proc/{pid}/{folder}").iterdir():
            found.append(os.readlink(entry))
    except OSError:
        pass  # it ended, or closed that one, while we looked
    return found


def keys(state: Path) -> Counter[str]:
    """The store's keys that have a value now. Of a copy: the daemon has the store locked."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("store.db", "store.db-wal"):
            if (state / name).exists():
                (Path(scratch) / name).write_bytes((state / name).read_bytes())
        with sqlite3.connect(Path(scratch) / "store.db") as store:
            latest = "SELECT key FROM log WHERE id IN (SELECT max(id) FROM log GROUP BY key) AND value IS NOT NULL"
            return Counter(key for (key,) in store.execute(latest))


def look(platform: Platform) -> dict[str, Counter[str]]:
    """All that there is of this platform, by kind."""
    state, pids = platform.state, platform.processes()
    group = f"corral-{hashlib.sha256(os.fsencode(state.resolve())).hexdigest()[:8]}"
    seen: dict[str, Counter[str]] = {}
    seen["processes"] = Counter(Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids)
    files = Counter(link.split(":[")[0].split(" ")[0] for pid in pids for link in links(pid, "fd"))
    seen["memfds"] = Counter({name: count for name, count in files.items() if "memfd:" in name})
    seen["open files"] = files - seen["memfds"]
    threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
    seen["threads"] = Counter({"beyond the pool": max(0, threads - POOL)})
    seen["namespaces"] = Counter(link for link in {os.readlink(f"/proc/{pid}/ns/net") for pid in pids})
    seen["sockets"] = Counter(
        line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if str(state) in line
    )
    seen["files"] = Counter(str(path.relative_to(state)) for path in state.rglob("*"))
    seen["control groups"] = Counter(place for place, _, _ in os.walk("/sys/fs/cgroup") if group in place)
    seen["mounts"] = Counter(line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line)
    seen["named namespaces"] = Counter(path.name for path in Path("/run/netns").glob("*"))
    kept = keys(state)
    seen["store keys"] = Counter({key: 1 for key in kept if not key.startswith(RECORDS)})
    seen["records"] = Counter(key.split("/")[1] for key in kept if key.startswith(RECORDS))
    return seen


def grown(before: dict[str, Counter[str]], after: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
    """What is more than it was."""
    return {kind: more for kind in before if kind != "records" and (more := after[kind] - before[kind])}


def resident(pid: int) -> int:
    """Bytes of the daemon's own memory."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel tells of it")


def ready(platform: Platform) -> bool:
    """The first run's template can be forked from."""
    phases = {row["status"]["phase"]: row["status"]["reason"] for row in platform.json("template", "list")}
    assert "error" not in phases, phases["error"]
    return "ready" in phases


def runs(platform: Platform, count: int, jobs: int) -> float:
    """Half one after the other, half ``jobs`` at once; seconds."""
    began = time.monotonic()
    for number in range(count // 2):
        done = platform.run("run", "micro", "--", "true", check=False)
        if done.returncode:
            print(f"run {number} ended with {done.returncode}: {done.stderr.decode()}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".lines") as file:
        file.write("".join(f"{number}\n" for number in range(count - count // 2)))
        file.flush()
        command = ["run", "--each", file.name, "-j", str(jobs), "--timings", "micro", "--", "true"]
        many = platform.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = many.communicate()
        failed = [row for row in out.decode().splitlines() if not row.startswith("  0 ")]
        print("\n".join([*failed, err.decode()]), flush=True)
    return time.monotonic() - began


def main() -> int:
    """The exit status: 1 when something grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    assert CORRAL.exists(), f"{CORRAL} is missing: script/setup"
    with Platform(env={"CORRAL_TEMPLATES": "on", "CORRAL_WARM": "off"}) as platform:
        platform.up()
        platform.run("run", "micro", "--", "true", timeout=300)
        wait_until(lambda: ready(platform), 300, "a template")
        for _ in range(4):
            platform.run("run", "micro", "--", "true")
        time.sleep(10)
        platform.assert_nothing_left()
        pid, before = platform.pid(), look(platform)
        memory = resident(pid)
        took = runs(platform, options.runs, options.jobs)
        deadline = time.monotonic() + SETTLE_S
        while (more := grown(before, look(platform))) and time.monotonic() < deadline:
            time.sleep(5)
        platform.assert_nothing_left()
        after, larger = look(platform), resident(pid) - memory
        assert platform.pid() == pid, "another daemon serves"
        print(f"{options.runs} runs in {took:.0f} s ({took / options.runs:.2f} s each)")
        for kind in before:
            print(f"{kind:18} {before[kind].total():6} {after[kind].total():6}   {'GREW' if kind in more else 'same'}")
        print(
            f"{'daemon, MiB':18} {memory / 2**20:6.1f} {(memory + larger) / 2**20:6.1f}   {larger / options.runs / 1024:.1f} KiB a run"
        )
        for kind, what in more.items():
            print(f"new {kind}: {dict(what.most_common(20))}")
        traced = platform.log().count("Traceback")
        if traced:
            print(f"{traced} tracebacks in the daemon's log:\n{platform.log()[-8000:]}")
        return int(bool(more) or bool(traced) or larger > WARM + GROWTH * min(options.runs, FULL))


if __name__ == "__main__":
    sys.exit(main())
