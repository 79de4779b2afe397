"""Plain arithmetic for a few threads and numpy for many choose assignments of the same worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.scheduler.shares.few import Few, steer_few
from corral.scheduler.shares.steer import Threads, cost, distances, steer


@st.composite
def hosts(draw: st.DrawFn) -> tuple[Few, list[float], list[int], list[int]]:
    cores = draw(st.integers(1, 4))
    count = draw(st.integers(1, 6))
    each = {"min_size": count, "max_size": count}
    few = Few(
        draw(st.lists(st.floats(0.01, 1.0), **each)), draw(st.lists(st.floats(-0.2, 0.2), **each)),
        draw(st.lists(st.integers(0, cores - 1), **each)), draw(st.lists(st.integers(0, 3), **each)),
    )  # fmt: skip
    per_core = {"min_size": cores, "max_size": cores}
    available = draw(st.lists(st.floats(0.3, 1.0), **per_core))
    return few, available, draw(st.lists(st.integers(0, 1), **per_core)), draw(st.lists(st.integers(0, 2), **per_core))


def worth(few: Few, core: list[int], available: list[float], horizon: float) -> float:
    """Φ of an assignment."""
    load = np.bincount(core, weights=few.entitled, minlength=len(available))
    owed = np.bincount(core, weights=few.deficit, minlength=len(available))
    return float(cost(load, owed, np.array(available), horizon).sum())


@given(hosts(), st.sampled_from([0.02, 0.1]), st.booleans())
def test_the_first_step_of_both_is_worth_the_same(
    host: tuple[Few, list[float], list[int], list[int]], horizon: float, whole: bool
) -> None:
    few, available, node, physical = host
    far = distances(np.array(node), np.array(physical))
    many = Threads(np.array(few.entitled), np.array(few.deficit), np.array(few.core), np.array(few.siblings))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("few", "steer"):
            patch.setattr(f"corral.scheduler.shares.{module}.ROUNDS", 1)
        one = steer_few(few, available, horizon, far.tolist(), whole=whole)
        other = [int(core) for core in steer(many, np.array(available), horizon, far, whole=whole)]
    before = worth(few, few.core, available, horizon)
    # Moves that cost differently may be worth the same: what counts is what is left after their cost.
    assert worth(few, one, available, horizon) + paid(few.core, one, far) == pytest.approx(
        worth(few, other, available, horizon) + paid(few.core, other, far), abs=1e-9
    )
    assert worth(few, one, available, horizon) <= before + 1e-12


def paid(before: list[int], after: list[int], far: np.ndarray) -> float:  # type: ignore[type-arg]
    """What the moves between two assignments cost: a swap or an exchange counts as two, however many threads go."""
    ways = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
    return sum(float(far[a, b]) + 5e-6 for a, b in ways) if ways else 0.0
