"""One run: a random workload, random faults, then calm, and the question whether all is as it should be.

The story of a seed: people create, start, stop, restart, pause, delete and cancel, some requests twice; machines crash,
hang and panic; processes die; a port is taken by somebody else; the host loses its power. Then faults end, a minute
passes, everything must have converged; at last all is deleted and nothing may be left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from corral.engine.protocol import Card, Drive, Exit, HostForward, Machine, State
from corral.model import Task, Vm, Volume
from corral.sim.checkers import excused, life_state, settled, state_of
from corral.sim.cluster import Cluster
from corral.sim.faults import Odds
from corral.sim.loop import VirtualLoop, simulate
from corral.sim.people import People
from corral.sim.quiet import Quiet
from corral.units import MIB

FAULTY_S = 60.0
CALM_S = 60.0
"""I7: within this time after the last fault all is as wanted."""
DELETING_S = 10.0
ORPHAN = "0ffa0000-0000-4000-8000-000000000000"
"""A machine on the host that no record knows."""


class Outcome(NamedTuple):
    """How a run ended. ``digest`` is of the whole story."""

    seed: int
    digest: str
    broken: tuple[str, ...]
    faults: int
    story: str


def swarm(seed: int) -> Odds:
    """Each seed has faults of its own: some kinds not at all, some much more often. Rare meetings become frequent."""
    dice = random.Random(f"odds {seed}")
    scaled = Odds(*(chance * dice.choice([0.0, 0.5, 1.0, 3.0]) for chance in Odds()))
    return scaled._replace(delay=dice.choice([0.0, 0.2, 0.6]), longest_delay_s=dice.choice([0.1, 0.5, 2.0]))


def run(seed: int, odds: Odds | None = None) -> Outcome:
    """Play one seed."""
    random.seed(seed)  # nobody may use it; who does is at least repeatable
    with Quiet() as errors:
        return simulate(lambda loop: _play(loop, seed, odds or swarm(seed), errors))


async def _play(loop: VirtualLoop, seed: int, odds: Odds, errors: list[str]) -> Outcome:
    cluster = Cluster(loop, seed, odds)
    checkers, narration = cluster.checkers, cluster.narration
    dice = random.Random(f"scenario {seed}")
    _put_orphan(cluster)
    await cluster.start()
    people = People(cluster, dice)
    nature = random.Random(f"nature {seed}")
    async with _storm(cluster, nature):
        await people.work(FAULTY_S)
    narration.tell("--- calm")
    await asyncio.sleep(CALM_S)
    await people.finish()
    await _check_converged(cluster)
    narration.tell("--- everything is deleted")
    async with _storm(cluster, nature):
        await people.delete_all()
        await asyncio.sleep(DELETING_S)
    narration.tell("--- calm")
    await asyncio.sleep(CALM_S)
    await people.finish()
    await _check_nothing_left(cluster)
    for line in errors:
        checkers.breaks("I5", f"an error nobody expected: {line}")
    await cluster.stop()
    return Outcome(seed, narration.digest(), tuple(checkers.broken), cluster.faults.count, narration.text())


def _put_orphan(cluster: Cluster) -> None:
    """Somebody's machine, with a disk and a port, is on the host before anything begins."""
    forward = HostForward(protocol="tcp", address="127.0.0.1", host=20022, guest=22)
    card = Card(name="net0", mac="52:54:00:00:00:01", hostname="orphan", forwards=(forward,))
    drive = Drive(name="root", path=cluster.world.root / ORPHAN / "root.qcow2", format="qcow2")
    made = cluster.world.start(Machine(id=ORPHAN, name="orphan", memory=64 * MIB, drives=(drive,), cards=(card,)))
    cluster.world.run(made)
    cluster.disks.parts[ORPHAN] = {"root"}


async def _nature(cluster: Cluster, dice: random.Random) -> None:
    """What happens to machines, processes and the host by itself."""
    world, checkers, narration = cluster.world, cluster.checkers, cluster.narration
    while True:
        await asyncio.sleep(dice.expovariate(1 / 5.0))
        deed = dice.choice(
            [
                "crash",
                "panic",
                "hang",
                "deafen",
                "fill_disk",
                "poweroff",
                "reboot",
                "port",
                "slow",
                "control",
                "agent",
                "host",
                "clock",
            ]
        )
        if deed in ("control", "agent"):
            cluster.crash(deed)
        elif deed == "host":
            if dice.random() < 0.3:
                narration.tell("FAULT the host loses its power")
                for id in world.machines:
                    checkers.hurt(id)
                world.lose_power()
                cluster.crash("agent")
                cluster.crash("control")
        elif deed == "port":
            world.foreign_ports.add(("tcp", 20000 + dice.randrange(5)))
        elif deed == "clock":
            step = dice.choice([-3600.0, -2.0, 2.0, 30.0])
            narration.tell(f"FAULT the wall clock jumps by {step:g} s")
            cluster.clock.wall_offset += step
        elif deed == "slow":
            world.boot = dice.choice([(1.0, 3.0), (10.0, 25.0)])
        else:
            alive = [id for id, machine in sorted(world.machines.items()) if machine.alive and id != ORPHAN]
            if alive:
                id = dice.choice(alive)
                _hurt(cluster, deed, id, dice)


def _hurt(cluster: Cluster, deed: str, id: str, dice: random.Random) -> None:
    world, machine = cluster.world, cluster.world.machines[id]
    started = machine.state in (State.RUNNING, State.PAUSED)
    if deed in ("panic", "poweroff", "reboot") and machine.state is not State.RUNNING:
        return
    if machine.state is State.PANICKED or (deed != "crash" and not started):
        return
    cluster.narration.tell(f"FAULT {cluster.checkers.name(id)}: {deed}")
    cluster.checkers.hurt(id)
    {"crash": world.crash, "panic": world.panic, "hang": world.hang, "deafen": world.deafen,
     "poweroff": world.poweroff, "reboot": world.reboot, "fill_disk": world.fill_disk}[deed](id)  # fmt: skip
    if deed in ("hang", "deafen", "fill_disk"):
        undo = {"hang": world.hang, "deafen": world.deafen, "fill_disk": world.fill_disk}[deed]
        length = dice.choice([1.0, 8.0, 40.0])

        def recover() -> None:
            if world.machines.get(id) is machine and machine.alive:
                undo(id, False)

        asyncio.get_running_loop().call_later(length, recover)


@asynccontextmanager
async def _storm(cluster: Cluster, dice: random.Random) -> AsyncIterator[None]:
    """Things go wrong while the block runs; after it all is well with the world again."""
    cluster.faults.storm()
    nature = asyncio.get_running_loop().create_task(_nature(cluster, dice))
    try:
        yield
    finally:
        nature.cancel()
        await asyncio.wait([nature])
    if not nature.cancelled():
        nature.result()
    cluster.faults.calm()
    world = cluster.world
    world.boot = (1.0, 3.0)
    for id, machine in sorted(world.machines.items()):
        if machine.alive:
            world.hang(id, False)
            world.deafen(id, False)
            world.fill_disk(id, False)


async def _check_converged(cluster: Cluster) -> None:
    """I7: what is wanted is so, in the record and in truth, or the record says why not."""
    checkers, world = cluster.checkers, cluster.world
    for vm in (await cluster.objects.list(Vm)).items:
        name, id = vm.meta.name, vm.meta.id
        state = state_of(world.machines.get(id))
        wish = f"{vm.spec.power}" + (" deleted" if vm.meta.deleted else "")
        if vm.meta.deleted is not None:
            checkers.breaks("I7", f"{name} is still not deleted")
        elif settled(vm):
            checkers.expect(state is life_state(vm), "I7", f"{name} is said to be {vm.status.phase}, it is {state}")
            if state is State.RUNNING:
                checkers.expect(world.answers(id), "I7", f"{name} is said to be running, its guest does not answer")
        elif excused(vm):
            cluster.narration.tell(f"excused: {name} is {vm.status.phase}: {vm.status.reason}")
            checkers.expect(state is State.EXITED, "I7", f"{name} is said to be {vm.status.phase}, it is {state}")
            blamed = "store" in vm.status.reason
            checkers.expect(not blamed, "I5", f"{name} is {vm.status.phase} because of the store: {vm.status.reason}")
        else:
            checkers.breaks("I7", f"{name} is {vm.status.phase} ({vm.status.reason!r}), wanted: {wish}")


async def _check_nothing_left(cluster: Cluster) -> None:
    """I8, and I6 for what was never ours."""
    checkers, world = cluster.checkers, cluster.world
    for vm in (await cluster.objects.list(Vm)).items:
        checkers.breaks("I8", f"the record of {vm.meta.name} is left, {vm.status.phase} ({vm.status.reason})")
    for volume in (await cluster.objects.list(Volume)).items:
        checkers.breaks("I8", f"the record of volume {volume.meta.name} is left")
    for prefix in ("/names/vms/", "/names/volumes/"):
        for entry in (await cluster.store.range(prefix)).entries:
            checkers.breaks("I8", f"the name {entry.key} is left")
    for task in (await cluster.objects.list(Task)).items:
        ended = task.status.state.final
        checkers.expect(ended, "I8", f"the task {task.spec.verb} of {task.spec.target_name} never ended")
    for id in sorted(world.machines):
        checkers.expect(id == ORPHAN, "I8", f"machine {id} is left")
    for id in sorted(cluster.disks.parts):
        checkers.expect(id == ORPHAN, "I8", f"the disks of {id} are left")
    exit = world.machines[ORPHAN].exit if ORPHAN in world.machines else Exit(asked=True)
    untouched = exit is None or exit.reason == "host-reboot"
    checkers.expect(untouched and ORPHAN in cluster.disks.parts, "I6", "a machine that nobody knew was touched")
