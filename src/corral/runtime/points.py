"""Every fault point there is. The kill tests go through this list, so a new step is tested by being here."""

from __future__ import annotations

VM_POINTS = (
    "create.volume",
    "create.seed",
    "create.ports",
    "create.spawned",
    "start.resumed",
    "start.connected",
    "start.answered",
    "stop.asked",
    "stop.killed",
    "stop.recorded",
    "delete.killed",
    "delete.removed",
    "delete.volume",
    "delete.recorded",
)
TEMPLATE_POINTS = (
    "template.disk",
    "template.spawned",
    "template.answered",
    "template.settled",
    "template.layered",
    "template.frozen",
    "template.cleared",
    "template.made",
    "template.ending",
    "template.delete",
    "template.discarded",
)
FAILURE_POINTS = ("end.recorded",)
PLACEMENT_POINTS = ("place.chosen", "place.recorded")
API_POINTS = ("api.before-commit", "api.after-commit")
ENGINE_POINTS = ("engine.spawn.dir", "engine.spawn.process", "engine.spawn.recorded")
FREEZE_POINTS = (
    "engine.freeze.prepared",
    "engine.freeze.copied",
    "engine.freeze.switched",
    "engine.freeze.finished",
    "engine.freeze.recorded",
)
FORK_POINTS = ("engine.fork.loaded", "engine.fork.unplugged", "fork.disk", "fork.identified", "fork.linked")
TAKE_POINTS = ("engine.take.given", "engine.take.recorded")
WARM_POINTS = ("warm.noted", "engine.warm.running", "warm.made", "warm.offered", "warm.withdrawn", "warm.ending")
ABANDON_POINTS = ("abandoned.found", "abandoned.recorded")
MEMORY_POINTS = ("memory.ballooned",)
ALL_POINTS = (
    *VM_POINTS, *FAILURE_POINTS, *PLACEMENT_POINTS, *API_POINTS, *ENGINE_POINTS, *FREEZE_POINTS, *FORK_POINTS,
    *TAKE_POINTS, *WARM_POINTS, *TEMPLATE_POINTS, *ABANDON_POINTS, *MEMORY_POINTS,
)  # fmt: skip
