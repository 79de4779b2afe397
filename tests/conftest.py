"""For every ring: a property holds however long the machine took to check it, so no example has a deadline, nor may
making one be too slow."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("corral", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corral")
