"""No governor: pretended and simulated hosts have no CPU time to divide."""

from __future__ import annotations

import asyncio

from corral.governor.protocol import Plan, Report


class NoGovernor:
    async def run(self) -> None:
        await asyncio.Event().wait()

    def follow(self, plan: Plan) -> None:
        pass

    def report(self) -> Report | None:
        return None
