"""The workload: people who ask for things, ask again when they are not sure, and remember what they were promised."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from typing import Any

from corral.api.service import Service
from corral.errors import CorralError, Refused, Unavailable, Unknown
from corral.model import Resource, Task, Vm
from corral.sim.cluster import Cluster

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")
"""Few, so that names are used again after a delete."""
VERBS = ("start", "stop", "restart", "reset", "pause", "resume")
DEEDS = ("create",) * 6 + VERBS + ("stop", "label", "delete", "delete", "cancel")
ATTEMPTS = 60
THINK_S = 4.0
"""Mean time between two requests of all people together."""


class People:
    """Everybody who uses the service in one run."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self._cluster, self._dice = cluster, dice
        self._requests: dict[asyncio.Task[None], None] = {}
        self._number = 0
        self._tasks: list[str] = []

    async def work(self, seconds: float) -> None:
        """Ask for things at random for some time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            self._spawn(self._something())
            await asyncio.sleep(self._dice.expovariate(1 / THINK_S))

    async def finish(self) -> None:
        """Wait for the answers that are still owed."""
        if self._requests:
            await asyncio.wait(list(self._requests), timeout=120.0)
        for request in self._requests:
            self._cluster.checkers.breaks("I7", f"a request never got an answer: {request.get_name()}")

    async def delete_all(self) -> None:
        """Delete every VM there is, all at once."""
        for vm in (await self._cluster.objects.list(Vm)).items:
            self._spawn(self._ask(f"delete {vm.meta.name}", functools.partial(_delete, id=vm.meta.id)))

    def _spawn(self, work: Any) -> None:
        request = asyncio.get_running_loop().create_task(work, name=f"request-{self._number}")
        self._requests[request] = None
        request.add_done_callback(self._ended)

    def _ended(self, request: asyncio.Task[None]) -> None:
        self._requests.pop(request, None)
        if not request.cancelled() and (error := request.exception()) is not None:
            self._cluster.checkers.breaks("I5", f"a request failed: {error!r}")

    async def _something(self) -> None:
        """One request, often for what is there, now and then for what is not; sometimes sent twice at once."""
        self._number += 1
        key = f"key-{self._number}"
        there = sorted(self._cluster.checkers.present())
        deed = self._dice.choice(DEEDS) if there or self._dice.random() < 0.2 else "create"
        name = self._dice.choice(there) if there and self._dice.random() < 0.9 else self._dice.choice(NAMES)
        force = self._dice.random() < 0.5
        work: Callable[[Service], Awaitable[Any]]
        if deed == "create":
            tree = self._wish(key)
            name = tree.get("name", "something")
            work = lambda s: s.create_vms(tree, key=key)  # noqa: E731
        elif deed == "delete":
            work = lambda s: s.delete_vm(name, force=force)  # noqa: E731
        elif deed == "cancel":
            if not self._tasks:
                return
            name = self._dice.choice(self._tasks[-5:])
            work = lambda s: s.cancel_task(name)  # noqa: E731
        elif deed == "label":
            work = lambda s: s.patch("vm", name, {"labels": {"last": key}})  # noqa: E731
        else:
            work = lambda s: s.power(deed, name, {"force": force}, key=key)  # noqa: E731
        title = f"{deed} {name} [{key}]"
        if self._dice.random() < 0.25:
            self._spawn(self._ask(f"{title} (again)", work, key))
        await self._ask(title, work, key)

    def _wish(self, key: str) -> dict[str, Any]:
        """The body of a create."""
        dice = self._dice
        card = {"publish": [{"host": dice.choice([0, 0, 20000 + dice.randrange(8)]), "guest": 80}]}
        memory = dice.choice([256, 512, 3072]) << 20
        restart = dice.choice(["always", "on-failure", "never"])
        spec = {"image": "sim", "memory": {"size": memory}, "nics": [card], "restart": restart}
        name = {"name": dice.choice(NAMES)} if dice.random() < 0.7 else {}
        return {**name, "labels": {"request": key}, "spec": spec}

    async def _ask(self, title: str, work: Callable[[Service], Awaitable[Any]], key: str = "") -> None:
        """Ask until there is an answer, always with the same key."""
        tell = self._cluster.narration.tell
        tell(f"> {title}")
        for _ in range(ATTEMPTS):
            try:
                answer = await self._cluster.ask(work, title)
            except (Unavailable, Unknown) as error:
                tell(f"  {title}: {error.message}; asked again")
                await asyncio.sleep(0.5)
                continue
            except Refused as error:
                tell(f"< {title}: refused, {error.code}: {error.message}")
                if self._cluster.checkers.made_by.get(key):
                    self._cluster.checkers.breaks("I3", f"{title} is refused, and yet it was done")
                return
            except CorralError as error:
                self._cluster.checkers.breaks("I5", f"{title}: {error!r}")
                return
            await self._promised(title, answer)
            return
        self._cluster.checkers.breaks("I7", f"{title}: no answer after {ATTEMPTS} attempts")

    async def _promised(self, title: str, answer: Any) -> None:
        """An answer is a promise: what it names is in the store."""
        cluster = self._cluster
        cluster.narration.tell(f"< {title}: accepted")
        if isinstance(answer, Resource) and not isinstance(answer, Task):
            return  # a label: no task comes of it
        tasks = [answer] if isinstance(answer, Task) else list(answer.tasks)
        for task in tasks:
            self._tasks.append(task.meta.id)
            if task.meta.id not in cluster.checkers.tasks:
                cluster.checkers.breaks("I3", f"{title} was acknowledged, its task is nowhere")
        for vm in () if isinstance(answer, Task) else answer.items:
            life = cluster.checkers.lives.get(vm.meta.id)
            if life is None or not life.created:
                cluster.checkers.breaks("I3", f"{title} was acknowledged, its VM never was")


async def _delete(service: Service, id: str) -> Any:
    return await service.delete_vm(id, force=True)
