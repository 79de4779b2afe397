"""``corral project …``: whose things these are, and what they get together."""

from __future__ import annotations

from corral.cli.noun import noun
from corral.cli.set import set_project

project = noun("project", deletable=False)
project.add_command(set_project)
