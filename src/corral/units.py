"""Quantities as people write them: sizes, durations, CPU shares. Parse and print, exactly and both ways.

Inside Corral bytes are ints and times are seconds; only the edges (CLI, API strings) use these functions.
"""

from __future__ import annotations

import math
import re

from corral.errors import Invalid, Problem

_SIZE = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_SIZE_RE = re.compile(r"(\d{1,15})(?:\.(\d{1,3}))?\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_TIME = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME_RE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d)?", re.ASCII)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MAX_SIZE = 1 << 60


def parse_size(text: str | int, field: str = "size") -> int:
    """Bytes of ``"512M"``, ``"1.5G"``, ``"4096"``. Units are powers of 1024; ``M``, ``MB`` and ``MiB`` are one thing.

    Raises :class:`Invalid` naming ``field``.
    """
    match = _SIZE_RE.fullmatch(str(text).strip())
    if match is None:
        raise Invalid([Problem(field, f"{_short(text)} is not a size", "a number with K, M, G or T, like 512M")])
    whole, fraction, unit = match.groups()
    factor = _SIZE[unit.lower()]
    value = int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)
    if value > MAX_SIZE:
        raise Invalid([Problem(field, f"{_short(text)} is too large", f"at most {format_size(MAX_SIZE)}")])
    return value


def format_size(count: int) -> str:
    """Shortest exact-looking form: ``512M``, ``1.5G``; three significant digits at most."""
    value, units = float(count), ["", "K", "M", "G", "T", "P"]
    for unit in units:
        if abs(value) < 1024 or unit == "P":
            text = f"{value:.3g}" if value < 1000 else f"{value:.0f}"
            return f"{text}{unit}" if unit else f"{count}B"
        value /= 1024
    raise AssertionError("unreachable")


def parse_duration(text: str | float, field: str = "duration") -> float:
    """Seconds of ``"30s"``, ``"1.5m"``, ``"250ms"``, ``"10"`` (a bare number is seconds). Raises :class:`Invalid`."""
    match = _TIME_RE.fullmatch(str(text).strip())
    if match is None:
        raise Invalid([Problem(field, f"{_short(text)} is not a duration", "a number with ms, s, m, h or d, like 30s")])
    return float(match[1]) * _TIME[match[2] or "s"]


def format_duration(seconds: float) -> str:
    """One or two units, rounded as people read it: ``0.4s``, ``12s``, ``3m20s``, ``5h``, ``2d3h``."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    total = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if total >= size:
            rest = total % size // lower_size
            return f"{total // size}{unit}" + (f"{rest}{lower}" if rest else "")
    return f"{total}s"


def parse_share(text: str | float, field: str = "share") -> float:
    """CPUs as a number: ``"0.5"`` is half a core, ``"50%"`` too, ``"200%"`` two cores. Raises :class:`Invalid`."""
    raw = str(text).strip()
    try:
        value = float(raw[:-1]) / 100 if raw.endswith("%") else float(raw)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise Invalid([Problem(field, f"{_short(text)} is not a share of CPU", "cores like 0.5, or per cent like 50%")])
    return value


def _short(text: object) -> str:
    """A user's value as it may stand in an error line: quoted, escaped, bounded."""
    shown = ascii(str(text))
    return shown if len(shown) <= 60 else shown[:57] + "…'"
