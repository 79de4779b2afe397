"""What the documents print was really printed: their Python runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.platform import REPOSITORY, Platform

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:It prints:\n```\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    """Each Python block of a document that is a whole program, and what it is said to print (empty: nothing is said)."""
    found = BLOCK.findall((REPOSITORY / name).read_text())
    return [(code, said) for code, said in found if "corral" in code]


CASES = [(name, n) for name in ("README.md", "docs/howto/sandbox.md") for n in range(len(blocks(name)))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_python_of_the_documents_runs_as_printed(shared: Platform, tmp_path: Path, name: str, number: int) -> None:
    code, said = blocks(name)[number]
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=shared.env, capture_output=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout != b""
    if said:
        assert done.stdout.decode() == said


def test_there_is_something_to_run() -> None:
    assert [name for name, _ in CASES].count("docs/howto/sandbox.md") == 2
    assert ("README.md", 0) in CASES
