"""Control groups, version 2: one hierarchy, whose controllers a parent hands down to its children."""

from __future__ import annotations

from pathlib import Path

from corral.host.cgroup import files
from corral.host.cgroup.meter import Field, Meter
from corral.host.cgroup.protocol import PERIOD_S

WEIGHT = 5000
"""Weight of one core's worth (1 to 10000 are allowed, so two cores' worth is the most that can be told apart)."""
PARENT = 100
"""Weight of all VMs together for each core of the host, against 100 of each other group: as on version 1."""
CONTROLLERS = ("cpu", "memory")


class GroupsV2:
    """``root``: a group of ours whose parent hands down the controller ``cpu``, and perhaps ``memory``."""

    shares = True

    def __init__(self, root: Path, name: str, cpus: int, controllers: frozenset[str]) -> None:
        self._cpus = cpus
        self._root, self._parent, self._controllers = root, root / name, controllers

    @property
    def limits_memory(self) -> bool:
        return "memory" in self._controllers

    @property
    def parents(self) -> tuple[Path, ...]:
        return (self._parent,)

    def describe(self) -> str:
        missing = (
            "" if "memory" in self._controllers else "; no memory controller: no limit beyond what guests are given"
        )
        return f"cgroup v2 in {self._parent}{missing}"

    def prepare(self, id: str) -> tuple[Path, ...]:
        enable = " ".join(f"+{name}" for name in CONTROLLERS if name in self._controllers)
        files.write(self._root / "cgroup.subtree_control", enable)
        files.make(self._parent)
        files.write(self._parent / "cgroup.subtree_control", enable)
        files.write(self._parent / "cpu.weight", str(min(10_000, PARENT * self._cpus)))
        return (files.make(self._parent / id) / "cgroup.procs",)

    def weight_file(self, id: str) -> Path:
        return self._parent / id / "cpu.weight"

    def weight_text(self, cores: float) -> str:
        return str(min(10_000, max(1, round(cores * WEIGHT))))

    def weight(self, id: str, cores: float) -> None:
        files.write(self.weight_file(id), self.weight_text(cores))

    def cap(self, id: str, cores: float | None) -> None:
        period = round(PERIOD_S * 1e6)
        quota = "max" if cores is None else str(max(1000, round(cores * period)))
        files.write(self._parent / id / "cpu.max", f"{quota} {period}")

    def meter(self, id: str) -> Meter:
        stat = self._parent / id / "cpu.stat"
        return Meter(Field(stat, "usage_usec", 1e-6), Field(stat, "throttled_usec", 1e-6))

    def memory_limit(self, id: str, limit: int | None) -> None:
        if "memory" in self._controllers:
            files.write(self._parent / id / "memory.max", "max" if limit is None else str(limit))

    def memory_usage(self, id: str) -> int | None:
        return files.number(self._parent / id / "memory.current") if "memory" in self._controllers else None

    def ooms(self, id: str) -> int:
        return files.field(self._parent / id / "memory.events", "oom_kill")

    def starved(self, id: str) -> bool:
        return False  # there is no such switch in version 2

    def remove(self, id: str) -> None:
        files.remove(self._parent / id)

    def inventory(self) -> list[str]:
        return files.children(self._parent)

    def close(self) -> None:
        files.remove_empty(self._parent)
