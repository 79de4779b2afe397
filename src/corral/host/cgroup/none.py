"""No control groups: VMs are told apart by nice values, and have neither cap nor memory limit."""

from __future__ import annotations

from pathlib import Path

from corral.host.cgroup.meter import Field, Meter


class NoGroups:
    """``why``: what is missing, in a sentence."""

    shares = False
    limits_memory = False
    parents: tuple[Path, ...] = ()

    def __init__(self, why: str) -> None:
        self._why = why

    def describe(self) -> str:
        return f"no control groups: {self._why}"

    def prepare(self, id: str) -> tuple[Path, ...]:
        return ()

    def weight(self, id: str, cores: float) -> None:
        pass

    def weight_file(self, id: str) -> None:
        return None

    def weight_text(self, cores: float) -> str:
        return ""

    def cap(self, id: str, cores: float | None) -> None:
        pass

    def meter(self, id: str) -> Meter:
        nothing = Field(Path("/nonexistent"), "", 0.0)
        return Meter(nothing, nothing)

    def memory_limit(self, id: str, limit: int | None) -> None:
        pass

    def memory_usage(self, id: str) -> int | None:
        return None

    def ooms(self, id: str) -> int:
        return 0

    def starved(self, id: str) -> bool:
        return False

    def remove(self, id: str) -> None:
        pass

    def inventory(self) -> list[str]:
        return []

    def close(self) -> None:
        pass
