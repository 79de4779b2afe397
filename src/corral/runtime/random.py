"""Randomness and ids, injected so that a simulated run repeats exactly."""

from __future__ import annotations

import os
import random
from typing import Protocol


class Random(Protocol):
    """Where code gets randomness from."""

    def token(self, size: int) -> bytes:
        """``size`` unpredictable bytes (keys, seeds, tickets)."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """A float between the two, for jitter."""
        ...

    def below(self, limit: int) -> int:
        """An int in ``range(limit)``."""
        ...

    def id(self) -> str:
        """A new random UUID (version 4), in its usual text form."""
        ...


def uuid_from(raw: bytes) -> str:
    """The version-4 UUID made of 16 random bytes."""
    value = bytearray(raw)
    value[6], value[8] = value[6] & 0x0F | 0x40, value[8] & 0x3F | 0x80
    text = value.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class SystemRandom:
    """The kernel's randomness."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def token(self, size: int) -> bytes:
        return os.urandom(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def below(self, limit: int) -> int:
        return self._random.randrange(limit)

    def id(self) -> str:
        return uuid_from(os.urandom(16))


class SeededRandom:
    """The same answers for the same seed, on every machine and under every PYTHONHASHSEED."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def below(self, limit: int) -> int:
        return self._random.randrange(limit)

    def id(self) -> str:
        return uuid_from(self._random.randbytes(16))
