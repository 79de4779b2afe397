"""Stories that once went wrong, told on purpose: one fault each, at the worst moment, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral.agent.steps import Steps
from corral.model import Phase, Task, TaskState, Vm
from corral.sim.cluster import Cluster
from corral.sim.faults import Odds
from corral.sim.loop import VirtualLoop, simulate
from corral.sim.quiet import Quiet

Story = Callable[[Cluster], Awaitable[None]]


def told(story: Story) -> Cluster:
    """Play a story in the calm; no invariant may break."""

    async def main(loop: VirtualLoop) -> Cluster:
        cluster = Cluster(loop, 1, Odds())
        cluster.faults.calm()
        await cluster.start()
        await story(cluster)
        await cluster.stop()
        assert not cluster.checkers.broken, cluster.narration.text()
        return cluster

    with Quiet() as errors:
        cluster = simulate(main)
    assert not errors
    return cluster


async def launch(cluster: Cluster, restart: str = "on-failure") -> str:
    tree = {"name": "web", "spec": {"image": "sim", "memory": {"size": 256 << 20}, "restart": restart}}
    return str((await cluster.ask(lambda s: s.create_vms(tree), "create")).items[0].meta.id)


async def power(cluster: Cluster, verb: str) -> str:
    return str((await cluster.ask(lambda s: s.power(verb, "web"), verb)).meta.id)


async def vm(cluster: Cluster) -> Vm:
    return await cluster.objects.find(Vm, "web")


async def task(cluster: Cluster, id: str) -> Task:
    return await cluster.objects.get(Task, id)


async def until(cluster: Cluster, check: Callable[[Vm], Any], seconds: float = 20.0) -> None:
    for _ in range(int(seconds * 10)):
        if check(await vm(cluster)):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"after {seconds:g} s: {(await vm(cluster)).status}\n{cluster.narration.text()}")


def is_in(phase: Phase) -> Callable[[Vm], bool]:
    return lambda one: one.status.phase is phase and one.status.observed == one.meta.generation


def test_a_reset_is_not_done_before_a_silent_hypervisor_has_taken_it() -> None:
    async def story(cluster: Cluster) -> None:
        id = await launch(cluster)
        await until(cluster, is_in(Phase.RUNNING))
        cluster.world.hang(id)
        asked = await power(cluster, "reset")
        await asyncio.sleep(8)
        assert not (await task(cluster, asked)).status.state.final
        cluster.world.hang(id, False)
        await until(cluster, lambda one: one.status.resets == 1 and one.status.phase is Phase.RUNNING)
        await asyncio.sleep(1)
        assert (await task(cluster, asked)).status.state is TaskState.DONE
        assert cluster.world.machines[id].boots == 2

    told(story)


def test_a_resume_whose_answer_is_lost_has_happened() -> None:
    async def story(cluster: Cluster) -> None:
        id = await launch(cluster)
        await until(cluster, lambda _: id in cluster.world.machines and cluster.world.machines[id].boots == 1)
        await power(cluster, "pause")
        await until(cluster, is_in(Phase.PAUSED))
        assert not cluster.world.answers(id), "it was paused before its guest ever answered"
        cluster.faults.order("the engine's answer to resume is lost")
        await power(cluster, "resume")
        await until(cluster, is_in(Phase.RUNNING))

    told(story)


@pytest.mark.timeout(30)
def test_a_pause_that_fails_at_first_does_not_spin() -> None:
    async def story(cluster: Cluster) -> None:
        await launch(cluster)
        await until(cluster, is_in(Phase.RUNNING))
        cluster.faults.order("the engine fails to pause")
        await power(cluster, "pause")
        await until(cluster, is_in(Phase.PAUSED))
        await power(cluster, "resume")
        await until(cluster, is_in(Phase.RUNNING))

    told(story)


def test_an_agent_that_has_just_come_back_does_not_vouch_for_a_silent_machine() -> None:
    async def story(cluster: Cluster) -> None:
        id = await launch(cluster)
        await until(cluster, is_in(Phase.RUNNING))
        cluster.world.hang(id)
        cluster.crash("agent")
        asked = await power(cluster, "start")
        await asyncio.sleep(30)
        assert not (await task(cluster, asked)).status.state.final
        cluster.world.hang(id, False)
        await until(cluster, is_in(Phase.RUNNING))
        await asyncio.sleep(1)
        assert (await task(cluster, asked)).status.state is TaskState.DONE

    told(story)


@pytest.mark.parametrize("fault", ["the store's reply to agent is lost", "the store is away for agent"])
def test_a_store_that_is_away_while_a_vm_starts_is_no_failure_of_the_vm(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    async def story(cluster: Cluster) -> None:
        allot, faults = Steps._allot, [fault]

        async def unlucky(self: Steps, one: Vm, *more: Any) -> Vm:
            if faults:
                cluster.faults.order(faults.pop())
            return await allot(self, one, *more)

        monkeypatch.setattr(Steps, "_allot", unlucky)
        await launch(cluster, "never")
        await until(cluster, is_in(Phase.RUNNING))
        assert not faults
        assert "error" not in cluster.narration.text()

    told(story)


def test_a_launch_survives_the_death_of_every_process_right_after_it_was_promised() -> None:
    async def story(cluster: Cluster) -> None:
        await launch(cluster)
        cluster.crash("control")
        cluster.crash("agent")
        await until(cluster, is_in(Phase.RUNNING))
        assert cluster.world.spawned == 1

    told(story)


def test_an_agent_that_dies_right_after_the_process_was_made_adopts_it() -> None:
    async def story(cluster: Cluster) -> None:
        cluster.faults.order("agent dies at engine.spawn.process")
        id = await launch(cluster)
        await until(cluster, is_in(Phase.RUNNING), 30)
        assert cluster.world.spawned == 1
        assert cluster.world.machines[id].boots == 1

    told(story)


@pytest.mark.parametrize("dies", [False, True])
def test_a_guest_that_hangs_is_given_up_once_whoever_dies_meanwhile(dies: bool) -> None:
    async def story(cluster: Cluster) -> None:
        id = await launch(cluster)
        await until(cluster, is_in(Phase.RUNNING))
        if dies:
            cluster.faults.order("agent dies at end.recorded")
        cluster.world.deafen(id)
        await until(cluster, is_in(Phase.UNRESPONSIVE))
        await until(cluster, is_in(Phase.PENDING))
        await until(cluster, is_in(Phase.RUNNING), 30)
        assert (cluster.world.spawned, (await vm(cluster)).status.failures) == (2, 1)

    told(story)


def test_a_guest_that_stood_still_for_long_is_not_blamed_for_its_silence() -> None:
    async def story(cluster: Cluster) -> None:
        id = await launch(cluster)
        await until(cluster, is_in(Phase.RUNNING))
        for stand in (cluster.world.hang, cluster.world.fill_disk):
            stand(id)
            await asyncio.sleep(25)
            stand(id, False)
            await until(cluster, is_in(Phase.RUNNING))
            await asyncio.sleep(10)
        await power(cluster, "pause")
        await asyncio.sleep(100)
        await power(cluster, "resume")
        await until(cluster, is_in(Phase.RUNNING))
        await asyncio.sleep(10)
        assert (cluster.world.spawned, (await vm(cluster)).status.failures) == (1, 0)
        assert "the guest hung" not in cluster.narration.text()

    told(story)
