"""Limits of drives in QEMU's words: a throttle group for each drive, which its topmost block node belongs to.

QEMU's is a leaky bucket: it leaks at the steady rate and holds a tenth of a second of it, or with a burst
``max`` × ``max-length``; a second bucket keeps the burst itself to ``max`` a second, unless the length is 1.
"""

from __future__ import annotations

from collections.abc import Iterator

from corral.engine.protocol import Limits
from corral.errors import Problem

MAX_RATE = 10**15
"""QEMU takes no larger limit, nor a burst that amounts to more."""


def group(drive: str) -> str:
    """Id of the drive's throttle group."""
    return f"limits-{drive}"


def limits_of(limits: Limits) -> dict[str, object]:
    """The property ``limits`` of a group. All that we ever set is stated: QEMU keeps what it is not told of."""
    return {
        "iops-total": limits.iops,
        "iops-total-max": limits.iops_burst,
        "iops-total-max-length": limits.burst_s if limits.iops_burst else 1,
        "bps-total": limits.bandwidth,
        "bps-total-max": limits.bandwidth_burst,
        "bps-total-max-length": limits.burst_s if limits.bandwidth_burst else 1,
    }


def setting(drive: str, limits: Limits) -> dict[str, object]:
    """Arguments of ``qom-set``."""
    return {"path": f"/objects/{group(drive)}", "property": "limits", "value": limits_of(limits)}


def limit_problems(limits: Limits) -> Iterator[Problem]:
    """What QEMU would not take."""
    for field, steady, burst in (
        ("iops", limits.iops, limits.iops_burst),
        ("bandwidth", limits.bandwidth, limits.bandwidth_burst),
    ):
        if min(steady, burst) < 0 or steady > MAX_RATE or burst * limits.burst_s > MAX_RATE:
            yield Problem(
                f"drives.limits.{field}", f"{steady}, {burst} in a burst, is out of range", f"0 to {MAX_RATE}"
            )
        elif burst and not 0 < steady <= burst:
            yield Problem(f"drives.limits.{field}_burst", f"{burst} is no burst over {steady}", "more than the limit")
    if limits.burst_s < 2:
        yield Problem("drives.limits.burst_s", f"{limits.burst_s} s is no burst", "2 or more")
