"""The limit of memory around a QEMU: far above what it takes, also for a fork, and set before its process starts."""

from __future__ import annotations

from typing import Any

from corral.agent.machine import memory_net
from corral.host.cgroup.none import NoGroups

from .stage import MIB, Stage, on_stage, vm_id


def test_the_net_is_above_all_that_a_guest_and_its_qemu_can_take() -> None:
    size, overhead = 512 * MIB, 64 * MIB
    assert memory_net(size, overhead, forked=False) >= size + 2 * overhead
    assert memory_net(size, overhead, forked=True) >= 2 * size + 2 * overhead, "its own pages, and its template's"


def test_the_limit_is_set_before_there_is_a_process(monkeypatch: Any) -> None:
    told: list[tuple[str, int | None, int]] = []

    async def test(stage: Stage) -> None:
        def note(_self: NoGroups, id: str, limit: int | None) -> None:
            told.append((id, limit, len(stage.world.machines)))

        monkeypatch.setattr(NoGroups, "memory_limit", note)
        vm = await stage.launch()
        await stage.phase("running")
        ((id, limit, processes),) = told
        assert (id, processes) == (vm_id(), 0)
        assert limit is not None
        assert limit > vm.spec.memory.size

    on_stage(test)


def test_a_qemu_that_stands_at_its_limit_is_named_so(monkeypatch: Any) -> None:
    async def test(stage: Stage) -> None:
        monkeypatch.setattr(NoGroups, "starved", lambda _self, _id: True)
        await stage.launch()
        await stage.phase("running")
        stage.world.hang(vm_id())
        vm = await stage.phase("unresponsive")
        assert "stands still at its limit of memory" in vm.status.reason

    on_stage(test)
