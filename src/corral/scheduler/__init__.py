"""Decisions as pure functions: numbers in, numbers out. No I/O, no clock, no asyncio.

:mod:`~corral.scheduler.place` says which host can take a VM and why others cannot; :mod:`~corral.scheduler.restart`
what follows when a VM ends without being asked to; :mod:`~corral.scheduler.suspicion` when silence counts as hung;
:mod:`~corral.scheduler.shortage` when a VM has been short of CPU time for long; :mod:`~corral.scheduler.explain` why it
is slow.
"""
