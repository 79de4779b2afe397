"""Threads on cores: exact packings are found and kept, straddlers take turns, and nobody is owed more and more."""

from __future__ import annotations

import numpy as np
import pytest

from corral.scheduler.shares.steer import Threads, distances, drift, pack, settle, steer

ONE_NODE = distances(np.zeros(2, dtype=int), np.arange(2))


def threads(*entitled: float, core: list[int] | None = None, siblings: list[int] | None = None) -> Threads:
    count = len(entitled)
    return Threads(
        np.array(entitled), np.zeros(count), np.array(core if core is not None else [-1] * count),
        np.array(siblings if siblings is not None else range(count)),
    )  # fmt: skip


def packed(*entitled: float) -> tuple[list[int], float]:
    asked = threads(*entitled)
    start = asked._replace(core=settle(asked.entitled, asked.core, np.ones(2), asked.siblings))
    core = pack(start, ONE_NODE)
    return [int(c) for c in core], drift(asked.entitled, core, np.ones(2))


@pytest.mark.parametrize(
    "entitled", [(0.5, 0.5, 1.0), (0.2, 0.4, 0.6, 0.8), (0.5, 0.5, 0.5, 0.5), (0.9, 0.1, 0.3, 0.7)]
)
def test_what_can_be_divided_exactly_is(entitled: tuple[float, ...]) -> None:
    _, uneven = packed(*entitled)
    assert uneven < 1e-6


def test_threads_of_one_vm_get_cores_of_their_own() -> None:
    pair = threads(0.5, 0.5, 0.5, 0.5, siblings=[0, 0, 1, 1])
    core = settle(pair.entitled, pair.core, np.ones(2), pair.siblings)
    assert core[0] != core[1]
    assert core[2] != core[3]


def test_a_new_thread_does_not_move_the_others() -> None:
    asked = threads(0.5, 0.5, 0.5, core=[0, 1, -1])
    assert list(settle(asked.entitled, asked.core, np.ones(2), asked.siblings)[:2]) == [0, 1]


def fluid(entitled: list[float], available: list[float], seconds: float, tick: float = 0.02) -> np.ndarray:
    """What threads get when the kernel divides each core by entitlement, and :func:`steer` is asked each tick."""
    asked = threads(*entitled)
    core = settle(asked.entitled, asked.core, np.ones(2), asked.siblings)
    deficit, used, room = np.zeros(len(entitled)), np.zeros(len(entitled)), np.array(available)
    for _ in range(round(seconds / tick)):
        core = steer(asked._replace(core=core, deficit=deficit), room, tick, ONE_NODE)
        load = np.bincount(core, weights=asked.entitled, minlength=2)
        got = asked.entitled / load[core] * room[core] * tick
        used += got
        deficit += asked.entitled / asked.entitled.sum() * got.sum() - got
    return used / seconds


@pytest.mark.parametrize("count", [3, 5, 7])
def test_equal_ones_that_do_not_divide_take_turns(count: int) -> None:
    used = fluid([2 / count] * count, [1.0, 1.0], 4.0)
    assert np.abs(used / (2 / count) - 1).max() < 0.02


def test_a_core_that_others_use_too_is_borne_by_all() -> None:
    used = fluid([0.5, 0.5, 1.0], [1.0, 0.9], 10.0)
    assert np.abs(used / (np.array([0.5, 0.5, 1.0]) * 0.95) - 1).max() < 0.02


def test_no_core_is_left_idle_while_threads_wait() -> None:
    crowded = threads(0.1, 0.1, core=[0, 0])
    assert sorted(steer(crowded, np.ones(2), 0.02, ONE_NODE)) == [0, 1]


def test_a_thread_stays_on_its_numa_node_for_small_gains() -> None:
    asked = threads(0.66, 0.66, 0.66, core=[0, 0, 1])._replace(deficit=np.array([0.001, 0.001, -0.002]))
    assert list(steer(asked, np.ones(2), 0.02, distances(np.arange(2), np.arange(2)))) == [0, 0, 1]
    assert list(steer(asked, np.ones(2), 0.02, ONE_NODE)) != [0, 0, 1]


def test_a_straddler_prefers_the_other_thread_of_its_physical_core() -> None:
    pairs = distances(np.zeros(4, dtype=int), np.array([0, 0, 1, 1]))
    asked = Threads(
        np.array([0.8, 0.8, 0.8, 0.8, 0.8]), np.array([0.05, 0.0, 0.0, 0.0, 0.0]), np.array([0, 0, 3, 2, 1]),
        np.arange(5),
    )  # fmt: skip
    moved = steer(asked, np.ones(4), 0.02, pairs)
    assert list(moved) != list(asked.core)
    assert list(moved // 2) == list(asked.core // 2)


def test_busy_threads_begin_on_physical_cores_of_their_own() -> None:
    alone = settle(np.array([0.5, 0.5]), np.array([-1, -1]), np.ones(4), np.arange(2), np.array([0, 0, 1, 1]))
    assert {int(cpu) // 2 for cpu in alone} == {0, 1}
