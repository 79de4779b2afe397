"""Control groups, version 1: each controller is a hierarchy of its own, possibly mounted together with others."""

from __future__ import annotations

from pathlib import Path

from corral.host.cgroup import files
from corral.host.cgroup.meter import Field, Meter
from corral.host.cgroup.protocol import PERIOD_S

SHARES = 8192
"""Shares of one core's worth, among VMs."""
PARENT = 1024
"""Shares of all VMs together, for each core of the host: on a core they weigh as much as one other process. With more,
the platform's own commands starve beside busy guests (docs/decisions/0006)."""


class GroupsV1:
    """``mounts``: controller → where it is mounted. ``cpu`` and ``cpuacct`` are needed, ``memory`` is used if there."""

    shares = True

    def __init__(self, mounts: dict[str, Path], name: str, cpus: int) -> None:
        self._cpus = cpus
        self._parents = {controller: mounts[controller] / name for controller in mounts}
        self._cpu, self._account = self._parents["cpu"], self._parents["cpuacct"]
        self._memory = self._parents.get("memory")

    @property
    def limits_memory(self) -> bool:
        return self._memory is not None

    @property
    def parents(self) -> tuple[Path, ...]:
        return tuple(self._parents.values())

    def describe(self) -> str:
        missing = "" if self._memory else "; no memory controller: no limit beyond what guests are given"
        return f"cgroup v1 in {self._cpu}{missing}"

    def prepare(self, id: str) -> tuple[Path, ...]:
        for parent in self._parents.values():
            files.make(parent)
        files.write(self._cpu / "cpu.shares", str(PARENT * self._cpus))
        groups = dict.fromkeys(files.make(parent / id).resolve() for parent in self._parents.values())
        return tuple(group / "cgroup.procs" for group in groups)

    def weight_file(self, id: str) -> Path:
        return self._cpu / id / "cpu.shares"

    def weight_text(self, cores: float) -> str:
        return str(max(2, round(cores * SHARES)))

    def weight(self, id: str, cores: float) -> None:
        files.write(self.weight_file(id), self.weight_text(cores))

    def cap(self, id: str, cores: float | None) -> None:
        files.write(self._cpu / id / "cpu.cfs_period_us", str(round(PERIOD_S * 1e6)))
        quota = -1 if cores is None else max(1000, round(cores * PERIOD_S * 1e6))
        files.write(self._cpu / id / "cpu.cfs_quota_us", str(quota))

    def meter(self, id: str) -> Meter:
        return Meter(
            Field(self._account / id / "cpuacct.usage", "", 1e-9),
            Field(self._cpu / id / "cpu.stat", "throttled_time", 1e-9),
        )

    def memory_limit(self, id: str, limit: int | None) -> None:
        if self._memory is not None:
            files.write(self._memory / id / "memory.limit_in_bytes", str(-1 if limit is None else limit))

    def memory_usage(self, id: str) -> int | None:
        return None if self._memory is None else files.number(self._memory / id / "memory.usage_in_bytes")

    def ooms(self, id: str) -> int:
        return 0 if self._memory is None else files.field(self._memory / id / "memory.oom_control", "oom_kill")

    def starved(self, id: str) -> bool:
        return self._memory is not None and files.field(self._memory / id / "memory.oom_control", "under_oom") == 1

    def remove(self, id: str) -> None:
        for parent in self._parents.values():
            files.remove(parent / id)

    def inventory(self) -> list[str]:
        return sorted({id for parent in self._parents.values() for id in files.children(parent)})

    def close(self) -> None:
        for parent in self._parents.values():
            files.remove_empty(parent)
