"""Platforms on real QEMU. Images are built once, into the cache, and shared by every state directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from corral.agent.settings import Settings
from tests.integration.platform import Platform


@pytest.fixture
def platform() -> Iterator[Platform]:
    """A fresh state directory with a running daemon and the micro image."""
    with Platform() as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        yield one


@pytest.fixture(scope="module")
def shared() -> Iterator[Platform]:
    """Like ``platform``, shared by the tests of a module that do not kill it. A VM that failed is soon started again."""
    with Platform(settings=Settings(backoff_s=1.0)) as one:
        one.up()
        one.run("image", "build", "micro", timeout=300)
        yield one
