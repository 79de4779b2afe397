"""Control groups of VMs: weight and cap of CPU time, what was used, a limit of memory.

One parent per state directory, one group per VM below it. :func:`choose` finds out what this host really lets us write;
:mod:`~corral.host.cgroup.v1` and :mod:`~corral.host.cgroup.v2` are the two interfaces of the kernel,
:mod:`~corral.host.cgroup.none` is what is left without either. :mod:`~corral.host.cgroup.claim` says whose they are,
and removes nobody's.
"""

from corral.host.cgroup.choose import choose
from corral.host.cgroup.claim import claim
from corral.host.cgroup.meter import Meter
from corral.host.cgroup.protocol import Groups

__all__ = ["Groups", "Meter", "choose", "claim"]
