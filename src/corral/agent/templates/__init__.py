"""Templates on this host: booted, frozen, chosen for launches, noticed when they are stale, removed when unused.

:mod:`~corral.agent.templates.choose` and :mod:`~corral.agent.templates.budget` decide (pure),
:mod:`~corral.agent.templates.boot` boots and freezes, :mod:`~corral.agent.templates.jobs` keeps the records true,
:mod:`~corral.agent.templates.welcome` tells a fork who it is before anybody else hears of it.
"""
