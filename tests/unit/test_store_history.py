"""How much of the past a store remembers for its watchers: so many changes, or so many bytes of them."""

from __future__ import annotations

import pytest

from corral.errors import WatchLost
from corral.store.index import LEAST, Index
from corral.store.protocol import Batch, Change, Entry


def filled(number: int, size: int) -> Index:
    """An index in which one key was written so often, with values of so many bytes."""
    index, previous = Index(), None
    for revision in range(1, number + 1):
        entry = Entry("/a", bytes(size), 1, revision, revision, 0)
        index.apply(Batch(revision, (Change("/a", entry, previous),)))
        previous = entry
    return index


@pytest.mark.parametrize(
    ("number", "size", "left"),
    [
        (2000, 1, 2000),  # twice as many as are promised
        (2001, 1, 1000),
        (900, 20, 900),  # fewer, but at most twice the bytes
        (901, 20, 450),
        (300, 1000, LEAST),  # too large altogether: those who are a few behind are served all the same
        (LEAST, 1000, LEAST),
    ],
)
def test_the_past_is_forgotten_when_there_is_twice_too_much_of_it(number: int, size: int, left: int) -> None:
    index = filled(number, size)
    index.forget(index.surplus(1000, 9000))
    assert (len(index.history), index.size) == (left, left * size)
    assert index.history[0].revision == number - left + 1 == index.compacted + 1
    assert len(index.since(number)) == 1
    if left < number:
        with pytest.raises(WatchLost):
            index.since(number - left)
