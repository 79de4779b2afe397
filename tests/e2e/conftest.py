"""A real daemon on the fake engine, and the real `corral` process in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.platform import Platform


@pytest.fixture(scope="module")
def shared() -> Iterator[Platform]:
    """A running daemon that the tests of a module share; each uses names of its own."""
    with Platform(engine="fake") as one:
        one.up()
        yield one


@pytest.fixture
def fresh() -> Iterator[Platform]:
    """A state directory in which nothing runs yet."""
    with Platform(engine="fake") as one:
        yield one
