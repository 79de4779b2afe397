"""The simulator finds every planted bug, within few seeds."""

from __future__ import annotations

import pytest

from corral.sim.scenario import run
from tests.sim.planted import BUGS

WITHIN = 60


@pytest.mark.parametrize("name", list(BUGS))
def test_a_planted_bug_is_found(name: str) -> None:
    for seed in range(1, WITHIN + 1):
        with BUGS[name]():
            found = run(seed).broken
        if found:
            assert not run(seed).broken, "it is there without the planted bug too"
            return
    pytest.fail(f"{name}: {WITHIN} seeds and nobody noticed")
