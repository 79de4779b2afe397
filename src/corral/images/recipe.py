"""What a recipe is given to work with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from corral.images.convert import Converter
from corral.images.files import Progress
from corral.images.packages import Kernel, Packages

INSIDE = Path(__file__).parent / "inside"
"""The files that recipes put into guests, as they are."""

AGENT_PATH = "/usr/local/sbin/corral-guest"
"""Where corral-guest stands in every guest."""


class Ingredients(NamedTuple):
    """Everything from outside that a build uses; with the recipe's source it decides the result."""

    arch: str
    suite: str
    """The distribution's release that goes into the guest."""
    kernel: Kernel
    agent: Path
    """corral-guest for ``arch``."""
    packages: Packages
    converter: Converter
    work: Path
    """A directory for the build, removed afterwards."""
    inside: Path
    progress: Progress
