"""Who may use the CPUs now: entitlements by water-filling, and the cores on which they are had.

:mod:`~corral.scheduler.shares.fill` divides one capacity, :mod:`~corral.scheduler.shares.nested` a host among projects
and theirs among VMs, :mod:`~corral.scheduler.shares.dominant` several resources at once;
:mod:`~corral.scheduler.shares.steer` says on which cores CPU time is had. Classic form: with equal weights, no limits
and everybody hungry, each of N has 1/N of each moment.
"""
