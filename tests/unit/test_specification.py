"""Every promise names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_promise_has_a_test_that_exists() -> None:
    text = (ROOT / "SPECIFICATION.md").read_text()
    rows = re.findall(r"^\| (S\d+) \|.*\| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) >= 20
    assert len({number for number, _ in rows}) == len(rows)
    for number, tests in rows:
        for path in tests.split(", "):
            assert (ROOT / path).is_file(), f"{number} names {path}, which does not exist"
