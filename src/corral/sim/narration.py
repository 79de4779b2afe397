"""What happened in a run, line by line. The same seed must tell the same story, byte for byte."""

from __future__ import annotations

import asyncio
import hashlib


class Narration:
    """Lines with their virtual time. Ids are told by short names given in order of appearance."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def tell(self, text: str) -> None:
        """Add one line."""
        now = asyncio.get_running_loop().time()
        self.lines.append(f"{now:11.4f}  {text}")

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def digest(self) -> str:
        """What two runs of one seed must agree on."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]
