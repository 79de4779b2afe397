"""One per host: reconciles what is wanted (store) with what is seen (engine, files, guests).

:mod:`~corral.agent.reconcile` decides (pure), :mod:`~corral.agent.steps` does one thing at a time, idempotently, so
that a kill at any point resumes by itself. :mod:`~corral.agent.agent` is the loop around both. What it joins is told
in :mod:`~corral.agent.ports`; it may not be imported by the API or the controllers.
"""
