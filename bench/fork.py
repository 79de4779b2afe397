"""Starting a booted guest by forking it, at the level of the engine: what it costs in time, CPU time and memory.

Method. No daemon: a QemuEngine in this process. A guest of the image is booted as often as asked (each time to the agent's answer), the last one is frozen
and goes on. Then forks of it are made: fresh disk, create, resume, ping of the agent; CPU seconds are those of the QEMU process at that moment, memory is `Anonymous` of
smaps_rollup. The pause of the frozen guest is measured again while it writes at a given rate, and printed beside what it wrote meanwhile.
The arm "warm pool": the same, made ahead and not run; what is measured begins when it is given to a machine.
Forks per second: as many at once as there are cores. Image: built before (`corral image build`), found in CORRAL_CACHE.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.integration.fork_lab import Lab, anonymous, lab_of, run_to_its_end

from corral.engine.protocol import Machine, Template
from corral.guest.protocol import Command, Identity


def cpu_of(pid: int) -> float:
    """CPU seconds of all its threads, by the scheduler's own exact count."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


async def cold(lab: Lab, runs: int) -> tuple[list[float], Machine]:
    """Boot ``runs`` guests; the last one stays."""
    took = []
    for number in range(runs):
        began = time.monotonic()
        machine = lab.machine()
        seen = await lab.engine.create(machine)
        await lab.engine.resume(machine.id)
        guest = await lab.answer(machine.id)
        took.append(time.monotonic() - began)
        assert seen.pid is not None
        print(f"cold {took[-1]:.2f} s, CPU {cpu_of(seen.pid):.2f} s, own memory {anonymous(seen.pid)} MiB", flush=True)
        while number == runs - 1 and not (await guest.info()).ready:
            await asyncio.sleep(0.5)
        await guest.close()
        if number < runs - 1:
            await lab.gone(machine.id)
    return took, machine


async def fork(lab: Lab, template: Template, *, identify: bool, warm: bool = False) -> tuple[dict[str, float], str]:
    """One fork: seconds from the request to each step, CPU seconds and MiB at the end.

    ``warm``: disk and process are there already when it is asked for, as from the warm pool.
    """
    steps: dict[str, float] = {}
    began = time.monotonic()

    def step(name: str) -> None:
        steps[name] = time.monotonic() - began

    machine = await asyncio.to_thread(lab.fork_of, template)
    if warm:
        ready = await lab.engine.warm(machine)
        assert ready.pid is not None
        spent, waits = cpu_of(ready.pid), anonymous(ready.pid)
        await asyncio.sleep(0.2)
        began = time.monotonic()
    step("disk")
    seen = await lab.engine.create(machine, warm=warm)
    assert not warm or seen.pid == ready.pid
    step("loaded")
    answering = asyncio.create_task(
        lab.answer(machine.id, 30)
    )  # as the agent does: whoever wakes finds its first message
    await lab.engine.resume(machine.id)
    step("runs")
    guest = await answering
    step("answer")
    if identify:
        await guest.identify(
            Identity(
                time=time.time(), seed=os.urandom(64), hostname="fork", machine_id=os.urandom(16).hex(),
                ssh_host_key=b"PRIVATE\n", ssh_host_key_public=b"ssh-ed25519 AAAA\n", mac="52:54:00:12:34:56",
                address="10.0.2.16/24", gateway="10.0.2.2",
            )
        )  # fmt: skip
        await lab.engine.link(machine.id, "net0", True)
        step("identity")
    assert seen.pid is not None
    steps["CPU s"], steps["own MiB"] = cpu_of(seen.pid), anonymous(seen.pid)
    if warm:
        steps["CPU s"] -= spent
        steps["waiting"] = waits
    await guest.close()
    return steps, machine.id


async def forks(lab: Lab, template: Template, runs: int, *, warm: bool = False) -> dict[str, tuple[float, float]]:
    """Median, and what nine of ten stay below."""
    rows = []
    for _ in range(runs + 1):
        steps, id = await fork(lab, template, identify=True, warm=warm)
        rows.append(steps)
        await lab.gone(id)
    sorted_ones = {name: sorted(row[name] for row in rows[1:]) for name in rows[0]}  # the first warms caches
    return {name: (statistics.median(ones), ones[int(0.9 * (len(ones) - 1))]) for name, ones in sorted_ones.items()}


async def rate(lab: Lab, template: Template, count: int, at_once: int) -> float:
    turns = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with turns:
            _, id = await fork(lab, template, identify=True)
            await lab.gone(id)

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(count)))
    return count / (time.monotonic() - began)


async def pauses(lab: Lab, machine: Machine, runs: int) -> Machine:
    """Freeze a guest again and again, idle and while it writes memory."""
    for script in (
        "",
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=32",
        "while :; do dd if=/dev/urandom of=/dev/shm/x bs=64k count=256; done",
    ):
        guest = await lab.answer(machine.id)
        process = await guest.run(Command(argv=("sh", "-c", f"{script or ':'} 2>/dev/null")))
        await asyncio.sleep(2)
        rows = []
        for _ in range(runs):
            began = time.monotonic()
            template, machine = await lab.freeze(machine)
            rows.append((template.pause_s or 0, template.copied / (1 << 20), time.monotonic() - began))
            await lab.engine.discard(template.id)
        await process.close()
        await guest.close()
        pause, copied, took = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"pause {pause * 1e3:6.1f} ms (longest {max(rows)[0] * 1e3:.1f}), {copied:6.1f} MiB copied in it, {took:.2f} s in all: "
              f"{script or 'idle'}", flush=True)  # fmt: skip
    return machine


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="micro")
    parser.add_argument("--memory", type=int, default=256, help="MiB (default 256)")
    parser.add_argument("--cold", type=int, default=2, help="cold boots (default 2)")
    parser.add_argument("--runs", type=int, default=10, help="forks one by one (default 10)")
    parser.add_argument("--rate", type=int, default=20, help="forks for the rate (default 20)")
    parser.add_argument("--no-pauses", action="store_true")
    options = parser.parse_args()
    async with lab_of(options.image, options.memory << 20) as lab:
        boots, machine = await cold(lab, options.cold)
        guest = await lab.answer(machine.id)  # as the daemon makes templates: with somebody on the line
        template, machine = await lab.freeze(machine)
        await guest.close()
        print(
            f"template: pause {(template.pause_s or 0) * 1e3:.1f} ms, {template.copied >> 20} MiB copied in it, {template.disk >> 20} MiB on disk"
        )
        base = statistics.median(boots)
        for name, warm in (("fork", False), ("warm pool", True)):
            figures = await forks(lab, template, options.runs, warm=warm)
            for step, (median, most) in figures.items():
                print(f"  {name} {step:9} median {median:8.3f}  p90 {most:8.3f}")
            answer, identity = figures["answer"][0], figures["identity"][0]
            print(f"cold / {name}: to the answer {base / answer:.0f}, to identity {base / identity:.0f}")
        print(f"load average {os.getloadavg()[0]:.1f}")
        if options.rate:
            print(
                f"{await rate(lab, template, options.rate, os.cpu_count() or 1):.2f} forks/s with full identity, {os.cpu_count()} at once"
            )
        if not options.no_pauses:
            await pauses(lab, machine, 5)


if __name__ == "__main__":
    sys.exit(run_to_its_end(main()))
