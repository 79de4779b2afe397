"""What the API takes: many keep-alive readers for a while, then durable creates, on a pretended host with the real store.

Method. One daemon (CORRAL_ENGINE=fake: everything above the hypervisor is real, SQLite with synchronous=FULL) listens on its
unix socket. --clients connections, spread over --processes processes, read in turn a VM, a list of flavors and the version, as fast as
answers come, for --seconds; every answer but 200 is an error. Then --writers connections create VMs (one transaction each: VM, volume,
task) for --write-seconds; every acknowledged id must be found afterwards. Prints requests per second and latencies; the load generator
runs on the same cores, so figures are lower bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from corral import sync

READS = ("/v1/vms/bench", "/v1/flavors", "/v1/version")


class Tally(NamedTuple):
    """What one process saw."""

    times: list[float]
    errors: list[str]
    ids: list[str]


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    """One request on a kept connection, by hand: the generator must cost less than what it measures."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
    return int(answer[9:12]), await reader.readexactly(length)


async def reading(socket: str, until: float, tally: Tally, first: int) -> None:
    reader, writer = await asyncio.open_unix_connection(socket)
    number = first
    while time.monotonic() < until:
        path = READS[number % len(READS)]
        number += 1
        started = time.monotonic()
        status, body = await exchange(reader, writer, "GET", path)
        tally.times.append(time.monotonic() - started)
        if status != 200:
            tally.errors.append(f"{path}: {status} {body[:200]!r}")
    writer.close()


async def creating(socket: str, until: float, tally: Tally, _first: int) -> None:
    reader, writer = await asyncio.open_unix_connection(socket)
    body = json.dumps({"spec": {"image": "debian", "memory": {"size": 64 << 20}, "power": "stopped"}}).encode()
    while time.monotonic() < until:
        started = time.monotonic()
        status, answer = await exchange(reader, writer, "POST", "/v1/vms", body)
        tally.times.append(time.monotonic() - started)
        if status == 202:
            tally.ids.append(json.loads(answer)["items"][0]["meta"]["id"])
        else:
            tally.errors.append(f"{status} {answer[:200]!r}")
    writer.close()


def worker(what: str, socket: str, count: int, seconds: float, results: multiprocessing.Queue[Tally]) -> None:
    tally = Tally([], [], [])

    async def run() -> None:
        until = time.monotonic() + seconds
        work = reading if what == "read" else creating
        done = await asyncio.gather(*(work(socket, until, tally, n) for n in range(count)), return_exceptions=True)
        tally.errors.extend(repr(one) for one in done if one is not None)

    asyncio.run(run())
    results.put(tally)


def load(what: str, socket: str, clients: int, processes: int, seconds: float) -> Tally:
    """Have ``clients`` connections work for a while; everything they saw."""
    results: multiprocessing.Queue[Tally] = multiprocessing.Queue()
    shares = [clients // processes + (n < clients % processes) for n in range(processes)]
    workers = [multiprocessing.Process(target=worker, args=(what, socket, n, seconds, results)) for n in shares]
    for process in workers:
        process.start()
    tallies = [results.get(timeout=seconds + 120) for _ in workers]
    for process in workers:
        process.join()
    return Tally(
        sorted(t for tally in tallies for t in tally.times), [e for t in tallies for e in t.errors],
        [i for t in tallies for i in t.ids],
    )  # fmt: skip


def report(title: str, tally: Tally, seconds: float) -> None:
    times = tally.times or [0.0]
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    print(
        f"{title:24} {len(tally.times) / seconds:8.0f} /s   median {p50 * 1000:6.1f} ms   p99 {p99 * 1000:6.1f} ms   "
        f"max {times[-1] * 1000:6.1f} ms   errors {len(tally.errors)}"
    )
    for error in tally.errors[:5]:
        print(f"  {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--writers", type=int, default=32)
    parser.add_argument("--write-seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    state = Path(tempfile.mkdtemp(prefix="corral-bench-", dir="/var/tmp"))
    with (state / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "corral.server", "--state", str(state)],
            env={**os.environ, "CORRAL_ENGINE": "fake", "CORRAL_TEMPLATES": "off"}, stdout=log, stderr=log,
        )  # fmt: skip
    socket = str(state / "api.sock")
    try:
        while not Path(socket).exists():
            assert daemon.poll() is None, (state / "daemon.log").read_text()
            time.sleep(0.1)
        with sync.connect(state=state) as client:
            client.tasks.wait(client.images.build("debian").tasks[0].id)
            client.vms.launch("debian", name="bench", memory="128M")
            reads = load("read", socket, options.clients, options.processes, options.seconds)
            report(f"reads, {options.clients} clients", reads, options.seconds)
            writes = load("create", socket, options.writers, options.processes, options.write_seconds)
            report(f"creates, {options.writers} clients", writes, options.write_seconds)
            found = {vm.id for vm in client.vms.list()}
            lost = [id for id in writes.ids if id not in found]
            print(
                f"{len(writes.ids)} acknowledged, {len(lost)} lost, {len(found) - 1 - len(writes.ids)} unacknowledged"
            )
            rss = Path(f"/proc/{daemon.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
            print(f"daemon: {int(rss) / 1024:.0f} MiB RSS with {len(found)} VMs")
        return 1 if reads.errors or writes.errors or lost else 0
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
        shutil.rmtree(state)


if __name__ == "__main__":
    sys.exit(main())
