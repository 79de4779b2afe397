"""Platforms with templates, for benchmarks of forks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peers.started import Started, anonymous, cpu_of
from tests.integration.platform import Platform, wait_until

import corral.sync
from corral.agent.settings import Settings
from corral.client.sync import Vm

OVERCOMMIT = 10
"""A fork counts with all the memory that it may come to use; what benchmarks make of it uses little."""
SETTLED_S, MADE_S = 60.0, 600.0
TEMPLATES = 2
"""With a card and without, for `corral launch` and `corral run`; a fork of each waits, no more."""


class Forks:
    """A platform with templates of one image, and a client of it. ``warm``: forks are made ahead, one of each."""

    def __init__(self, image: str, *, warm: bool) -> None:
        self.image, self.warm = image, warm
        self.platform = Platform(
            env={"CORRAL_WARM": "on" if warm else "off"}, settings=Settings(warm_most=TEMPLATES)
        )  # fmt: skip
        self.client = corral.sync.Client(state=self.platform.state)
        self.standing: list[int] = []

    def up(self) -> None:
        self.platform.up()
        self.platform.run("image", "build", self.image, timeout=900)
        host = self.platform.text("host", "list", "-o", "name").strip()
        self.platform.run("host", "set", host, f"memory_overcommit={OVERCOMMIT}")

    def template(self, memory: str, *, network: bool = True) -> None:
        """Have one made; several at once take little longer than one, most of which is waiting for guests to be at rest."""
        name = f"{self.image}-{memory.lower()}" + ("" if network else "-alone")
        options = ["--no-wait"] if network else ["--no-wait", "--no-network"]
        self.platform.run("template", "create", self.image, "--name", name, "--memory", memory, *options)

    def ready(self) -> None:
        """All templates are made."""

        def so() -> bool:
            phases = {one.phase: one.status["reason"] for one in self.client.templates.list()}
            assert "error" not in phases, phases["error"]
            return set(phases) == {"ready"}

        wait_until(so, MADE_S, "templates to be made", 0.2)

    def settle(self) -> None:
        """Nothing is left of earlier starts, and the forks that are made ahead are there."""

        def so() -> bool:
            waiting = all(one.status["warm"] == 1 for one in self.client.templates.list()) if self.warm else True
            return waiting and not self.client.vms.list()

        wait_until(so, SETTLED_S, "the platform to be at rest", 0.05)
        self.standing = self.platform.processes()

    def start(self, memory: str, *, name: str, cold: bool = False) -> tuple[Vm, Started]:
        """Launch a VM, and what that was. Times are those of the daemon's own marks."""
        spec: dict[str, Any] = {"cold": True} if cold else {}
        spent, began = cpu_of(self.standing), time.time()
        vm = self.client.vms.launch(self.image, name=name, memory=memory, spec=spec, timeout=300)
        pid = vm.status["pid"]
        cpu = cpu_of([*self.standing, pid]) - spent
        told = vm.status["details"]["start"]
        assert told["how"] == ("cold" if cold else "fork"), told
        assert told["warm"] == self.warm, told
        delay = vm.meta["created"] - began
        marks = {step: delay + told["timings"][step] for step in told["timings"]}
        # One that booted is told who it is by its seed and with the first greeting: it counts as answering then.
        identity = marks.get("identity", marks["answer"])
        return vm, Started(answer=marks["answer"], identity=identity, cpu=cpu, own=anonymous(pid))

    def cpu(self) -> float:
        """CPU seconds of all processes that there are."""
        return cpu_of(self.platform.processes())


@contextmanager
def forks(image: str, *, warm: bool = False) -> Iterator[Forks]:
    """One that is up, gone afterwards with all its VMs."""
    one = Forks(image, warm=warm)
    with one.platform:
        one.up()
        try:
            yield one
        finally:
            names = [vm.name for vm in one.client.vms.list()]
            if names:
                one.platform.run("delete", "--force", *names, timeout=300, check=False)
            one.client.close()
