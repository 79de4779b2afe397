"""An engine without a hypervisor, for the simulator and for tests that need many machines: same behaviour, virtual
time.

:class:`FakeWorld` is one host's reality (machines, ports, guests); it survives daemons. :class:`FakeEngine` is what a
daemon holds: drop it and make another over the same world, and the daemon was restarted. What answers inside a machine
is :mod:`corral.guest.fake`, joined by :meth:`FakeWorld.guest_at`.
"""

from corral.engine.fake.engine import FakeEngine
from corral.engine.fake.machine import FakeMachine
from corral.engine.fake.world import FakeWorld

__all__ = ["FakeEngine", "FakeMachine", "FakeWorld"]
