"""Who may use the CPUs now: entitlements by water-filling, and the cores on which they are had.

:mod:`~corral.scheduler.shares.fill` says how much, :mod:`~corral.scheduler.shares.steer` where. Classic form: with
equal weights, no limits and everybody hungry, each of N has 1/N of each moment.
"""
