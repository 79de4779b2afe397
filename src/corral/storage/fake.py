"""The layers of disks that exist only as names, for the simulator and for tests: as :mod:`corral.storage.volumes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class FakeLayers:
    """Which layers each VM's disk has, the uppermost first."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._layers: dict[str, tuple[Path, ...]] = {}

    def root(self, vm_id: str) -> Path:
        """The layer that is written to; made when there is none."""
        return self._layers.setdefault(vm_id, (self._root / vm_id / "root.qcow2",))[0]

    def fork(self, vm_id: str, bases: Sequence[Path]) -> Path:
        """A fresh disk over ``bases``."""
        links = [self._root / vm_id / f"base-{number}.qcow2" for number in range(len(bases), 0, -1)]
        self._layers[vm_id] = (self._root / vm_id / "root.qcow2", *links)
        return self._layers[vm_id][0]

    def next(self, vm_id: str, over: Path) -> tuple[Path, ...]:
        """The layers with a fresh one over ``over``, which is written to now."""
        layers = self.of(vm_id)
        if layers[0].name == over.name:
            number = sum(layer.name.startswith("root") for layer in layers) + 1
            layers = self._layers[vm_id] = (self._root / vm_id / f"root-{number}.qcow2", *layers)
        return layers

    def of(self, vm_id: str) -> tuple[Path, ...]:
        return self._layers.get(vm_id, ())

    def forget(self, vm_id: str) -> None:
        self._layers.pop(vm_id, None)
