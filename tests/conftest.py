"""For every ring: a property holds however long the machine took to check it, so no example has a deadline."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("corral", deadline=None)
settings.load_profile("corral")
