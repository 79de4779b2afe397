"""What is measured, case by case. Each returns rows of a table; progress goes to standard error."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from peers import libvirtd
from tests.integration.platform import Platform

from shares import libvirt
from shares.arms import SETTLE_S, Arms
from shares.guests import fleet, run
from shares.measure import SAMPLE_S, Asked, Floats, Guest, Sampled, entitled, followed, jain, moving, sample, worst

TRIM_S = 20.0
"""Until a quota is trimmed to what its guest really has."""
HALF = "wave 3000 3000"


class Extent(NamedTuple):
    """``runs`` of ``seconds`` each, for these weights under these arms."""

    runs: int
    seconds: float
    sets: list[list[float]]
    arms: list[str]


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]

    def show(self) -> None:
        widths = [max(len(row[n]) for row in [self.head, *self.rows]) for n in range(len(self.head))]
        print(f"\n{self.title}\n")
        for row in [self.head, ["-" * width for width in widths], *self.rows]:
            print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")
        sys.stdout.flush()


def percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def name(weights: list[float]) -> str:
    return ":".join(f"{weight:g}" for weight in weights)


def say(row: list[str]) -> list[str]:
    print("  " + "  ".join(row), file=sys.stderr, flush=True)
    return row


CONSTANT = ["1 s worst", "1 s median", "10 s worst", "10 s median", "Jain", "idle", "other load"]


def judged(found: list[Sampled], asked: Asked) -> list[str]:
    """The columns of :data:`CONSTANT`."""
    windows = [
        [worst(one.run, asked, width) for one in found] for width in (1.0, min(10.0, len(found[0].run) * SAMPLE_S))
    ]
    return [
        *(percent(f(values)) for values in windows for f in (max, statistics.median)),
        f"{min(jain(one.run, asked) for one in found):.5f}",
        percent(max(one.idle for one in found)),
        percent(statistics.median(one.other for one in found), 1),
    ]


def constant(platform: Platform, extent: Extent) -> Table:
    rows = []
    for weights in extent.sets:
        if "libvirt" in extent.arms:
            rows.append(say([name(weights), "libvirt", *of_libvirt(platform, weights, extent)]))
        if rest := [arm for arm in extent.arms if arm != "libvirt"]:
            with fleet(platform, ["busy"] * len(weights)) as guests:
                arms, asked = Arms(platform), Asked.of(guests, weights)
                for arm in rest:
                    arms.enter(arm, guests, weights)
                    found = [sample(guests, extent.seconds) for _ in range(extent.runs)]
                    rows.append(say([name(weights), arm, *judged(found, asked)]))
    title = f"Constant demand: worst |x-1| of all VMs and windows, {extent.runs} runs of {extent.seconds:g} s"
    return Table(title, ["weights", "arm", *CONSTANT], rows)


def of_libvirt(platform: Platform, weights: list[float], extent: Extent) -> list[str]:
    if why := libvirtd.missing():
        return [f"not compared: {why}", *[""] * (len(CONSTANT) - 1)]
    parts, cmdline = micro(Path(platform.env["CORRAL_CACHE"]) / "images")
    with libvirt.running(parts, cmdline) as daemon:
        guests = [daemon.start(number, weight) for number, weight in enumerate(weights)]
        time.sleep(10)  # they boot
        return judged([sample(guests, extent.seconds) for _ in range(extent.runs)], Asked.of(guests, weights))


def micro(images: Path) -> tuple[Path, str]:
    """Directory and kernel command line of the built micro image."""
    for path in sorted(images.glob("*/manifest.json")):
        manifest = json.loads(path.read_text())
        if manifest["name"] == "micro":
            return path.parent, manifest["cmdline"]
    raise RuntimeError(f"{images} has no micro image: corral image build micro")


def changing(platform: Platform, extent: Extent, keep: Path | None) -> Table:
    """The last guest wants its CPU for 3 s of every 6, the others always. ``keep``: where the samples go, for a picture."""
    rows, kept = [], {}
    for weights in extent.sets:
        with fleet(platform, [*["busy"] * (len(weights) - 1), HALF]) as guests:
            arms, asked = Arms(platform), Asked.of(guests, weights)
            for arm in extent.arms:
                arms.enter(arm, guests, weights)
                found = [sample(guests, extent.seconds) for _ in range(extent.runs)]
                errors = [moving(one, asked) for one in found]
                kept[arm] = found[-1].run / SAMPLE_S, followed(found[-1], asked) / SAMPLE_S
                idle, other = max(one.idle for one in found), statistics.median(one.other for one in found)
                row = [percent(f(errors)) for f in (statistics.median, max)]
                rows.append(say([name(weights), arm, *row, percent(idle), percent(other, 1)]))
        if keep is not None:
            flat = {
                f"{arm}:{n}": table
                for arm, both in kept.items()
                for n, table in zip(("used", "due"), both, strict=True)
            }
            np.savez(keep, **flat)
            keep = None  # one picture: of the first weights
    title = f"Changing demand: Σ|used-due|/Σused over 1 s, {extent.runs} runs of {extent.seconds:g} s"
    return Table(title, ["weights", "arm", "median", "worst", "idle", "other load"], rows)


def caps(platform: Platform, extent: Extent) -> Table:
    """Two guests at a time with limits that add up to one core."""
    rows = []
    with fleet(platform, ["busy", "busy"]) as guests:
        for low in (10, 20, 30, 40, 50):
            limits = [low, 100 - low]
            for guest, limit in zip(guests, limits, strict=True):
                platform.run("vm", "set", guest.id, f"cpu.limit={limit}%")
            time.sleep(TRIM_S)
            found = np.array(
                [sample(guests, extent.seconds).run.sum(axis=0) / extent.seconds for _ in range(extent.runs)]
            )
            for column, limit in list(enumerate(limits))[: 1 if low == 50 else 2]:
                used = found[:, column]
                off = used / (limit / 100) - 1
                rows.append(
                    say(
                        [
                            f"{limit} %",
                            percent(float(np.median(used))),
                            *(f"{100 * e:+.2f} %" for e in (off.min(), off.max())),
                        ]
                    )
                )
    rows.sort(key=lambda row: int(row[0].split()[0]))
    title = f"Caps: use over {extent.seconds:g} s against the cap, {extent.runs} runs"
    return Table(title, ["cap", "used, median", "lowest", "highest"], rows)


def reservation(platform: Platform, extent: Extent) -> Table:
    """Half a core reserved and the least weight, beside three neighbours who want all: a counter in the guest."""
    rows = []
    with fleet(platform, ["", "busy", "busy", "busy"]) as guests:
        Arms(platform).enter("corral", guests, [0.01, 100.0, 100.0, 100.0])
        platform.run("vm", "set", guests[0].id, "cpu.reserve=50%")
        for what, steady in (("steady neighbours", True), ("neighbours that come and go", False)):
            if not steady:
                for guest in guests[2:]:
                    platform.run("exec", guest.name, "--", "sh", "-c", "killall load; true")
                    run(platform, guest, "wave 1700 900")
            rows.append(say([what, *counted(platform, guests, extent)]))
    head = ["beside", "used, median", "use: spread", "counter: spread", "counter: deviation", "other load"]
    return Table(f"Reservation of 50 % of a core: {extent.runs} windows of {extent.seconds:g} s", head, rows)


def counted(platform: Platform, guests: list[Guest], extent: Extent) -> list[str]:
    """What the first guest got, in the host's counters and in its own."""
    first = guests[0]
    platform.run("exec", first.name, "--", "rm", "-f", "/count")
    run(platform, first, f"count {round(extent.seconds * 1000)} {extent.runs + 1} /count")
    time.sleep(SETTLE_S)
    found = [sample(guests, extent.seconds) for _ in range(extent.runs)]
    time.sleep(extent.seconds)
    text = platform.text("exec", first.name, "--", "cat", "/count")
    rates = [int(line.split()[0]) / int(line.split()[1]) for line in text.splitlines()[1:]]  # the first: settling
    used = [float(one.run[:, 0].sum()) / extent.seconds for one in found]
    other = statistics.median(one.other for one in found)
    deviation = statistics.pstdev(rates) / statistics.fmean(rates)
    return [
        percent(statistics.median(used)),
        percent(spread(used)),
        percent(spread(rates)),
        percent(deviation),
        percent(other, 1),
    ]


def spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.fmean(values)


def theft(platform: Platform, extent: Extent) -> Table:
    """One of three equal guests sleeps for the last 5 % of each period, in the hope of not being charged."""
    rows = []
    with fleet(platform, ["", "busy", "busy"]) as guests:
        Arms(platform).enter("corral", guests, [1.0, 1.0, 1.0])
        asked = Asked.of(guests, [1.0, 1.0, 1.0])
        for period_us in (1000, 4000, 10_000, 20_000, 100_000):
            run(platform, guests[0], f"thief {period_us} {period_us // 20}")
            time.sleep(SETTLE_S)
            found = [sample(guests, extent.seconds) for _ in range(extent.runs)]
            gains = [one.run[:, 0].sum() / entitled(one.run.sum(), asked, asked.most)[0] - 1 for one in found]
            platform.run("exec", guests[0].name, "--", "sh", "-c", "killall load; true")
            rows.append(
                say([f"{period_us / 1000:g} ms", *(f"{100 * f(gains):+.2f} %" for f in (statistics.median, max))])
            )
    title = f"Asleep before each tick: use over its share, {extent.runs} runs of {extent.seconds:g} s"
    return Table(title, ["period", "median", "most"], rows)


def returning(platform: Platform, extent: Extent) -> Table:
    """How long after an idle guest came back everybody has its share again, within 5 % over the second that follows."""
    rows = []
    for weights in ([1.0, 1.0, 1.0], [1.0, 1.0, 2.0]):
        with fleet(platform, ["busy", "busy", "wave 5000 4000"]) as guests:
            Arms(platform).enter("corral", guests, weights)
            asked = Asked.of(guests, weights)
            sampled = sample(guests, 9.0 * (extent.runs + 1))
            times = [settled(sampled.run, start, asked) for start in awakened(sampled)]
            rows.append(
                say([name(weights), str(len(times)), f"{statistics.median(times):.1f} s", f"{max(times):.1f} s"])
            )
    return Table(
        "An idle VM returns: time until every share is within 5 %", ["weights", "returns", "median", "worst"], rows
    )


def awakened(sampled: Sampled) -> list[int]:
    """Samples in which the last guest begins to want its CPU, with 4.5 s to look at after them."""
    wants = (sampled.run + sampled.wait)[:, -1] > 0.5 * SAMPLE_S
    rises = [n for n in range(10, len(wants) - 45) if wants[n] and not wants[n - 10 : n].any()]
    assert rises, "the guest never came back"
    return rises


def settled(run: Floats, start: int, asked: Asked) -> float:
    """Seconds; 4 when it did not."""
    for offset in range(36):
        used = run[start + offset : start + offset + 10].sum(axis=0)
        if np.abs(used / entitled(used.sum(), asked, asked.most) - 1).max() <= 0.05:
            return offset * SAMPLE_S
    return 4.0


def pairs(platform: Platform, extent: Extent) -> Table:
    """Guests with two CPUs among each other, and beside guests with one."""
    rows = []
    for weights, cpus in (
        ([1.0, 1.0], [2, 2]),
        ([1.0, 3.0], [2, 2]),
        ([1.0, 1.0, 1.0], [2, 1, 1]),
        ([2.0, 1.0, 1.0], [2, 1, 1]),
    ):
        with fleet(platform, ["busy"] * len(cpus), cpus) as guests:
            arms, asked = Arms(platform), Asked.of(guests, weights)
            arms.enter("corral", guests, weights)
            found = [sample(guests, extent.seconds) for _ in range(extent.runs)]
            rows.append(say([name(weights), name([float(count) for count in cpus]), *judged(found, asked)]))
    return Table(
        f"Guests with two CPUs, {extent.runs} runs of {extent.seconds:g} s", ["weights", "CPUs", *CONSTANT], rows
    )


def foreign(platform: Platform, extent: Extent) -> Table:
    """Another busy program on the host, of normal priority."""
    rows = []
    for weights in ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        with fleet(platform, ["busy"] * len(weights)) as guests:
            arms, asked = Arms(platform), Asked.of(guests, weights)
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                for arm in extent.arms:
                    arms.enter(arm, guests, weights)
                    found = [sample(guests, extent.seconds) for _ in range(extent.runs)]
                    rows.append(say([name(weights), arm, *judged(found, asked)]))
            finally:
                other.kill()
                other.wait()
    return Table(
        f"Beside a busy program of the host, {extent.runs} runs of {extent.seconds:g} s",
        ["weights", "arm", *CONSTANT],
        rows,
    )
