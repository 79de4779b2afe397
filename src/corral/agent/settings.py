"""The agent's constants, each with its reason. A host may have others: ``agent.toml`` in its state (:func:`read`)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

from corral.errors import Invalid, Problem
from corral.scheduler.restart import Patience
from corral.units import GIB, MIB


class Settings(NamedTuple):
    """Seconds and counts."""

    heartbeat_s: float = 5.0
    """One ping of every guest in this time, spread by jitter."""
    heartbeat_timeout_s: float = 2.0
    """A guest whose ping takes longer missed the beat."""
    misses: int = 3
    """Missed beats in a row until a VM is called unresponsive."""
    inspect_every: int = 6
    """Beats between two questions to a hypervisor whose guest answers (the answer already came through it)."""
    info_every: int = 12
    """Beats between two looks at a guest's addresses."""
    hang_patience_s: float = 60.0
    """A guest that is called hung has so long to come back before its power is cut, if its owner lets us."""
    silent_patience_s: float = 300.0
    """The same for a QEMU that does not answer: what it waits for (a disk, a debugger) may well come back."""
    boot_patience_s: float = 300.0
    """A guest that has not answered so long after its start is called unresponsive; it may still come."""
    stop_patience_s: float = 60.0
    """A guest that was asked to power off and has not after this time is complained about."""
    stop_repeat_s: float = 20.0
    """The power button is pressed again this often: a guest may ignore it while it boots."""
    ending_s: float = 10.0
    """A QEMU whose guest powered off ends in milliseconds; after this it is killed."""
    stall_retry_s: float = 10.0
    """A VM that stands still because the host's disk is full is tried again this often."""
    stall_settle_s: float = 2.0
    """One that was let go on has what it wrote refused again at once, or it goes on for good."""
    disk_error_s: float = 600.0
    """A read or write that failed is told beside the VM's phase for so long."""
    backoff_s: float = 10.0
    """From the first failure to the next start; doubled with each one in a row."""
    backoff_most_s: float = 300.0
    healthy_s: float = 600.0
    """A VM that ran this long has its earlier failures forgotten."""
    poison: int = 3
    """Failures in a row after which a VM is given up until a person starts it."""
    start_cap_s: float = 45.0
    """A starting VM holds its turn at most so long: one that never answers must not block others."""
    start_cap_blind_s: float = 3.0
    """The same for images without an agent: nobody tells when they are up."""
    starting_extra: int = 1
    """Under emulation a boot is pure CPU work: cores + this many boot at once, more would make all of them late."""
    recheck_s: float = 30.0
    """What waits for something that sends no event (free memory, a port) is looked at again after this."""
    workers: int = 64
    """VMs handled at once. A silent hypervisor holds one for its deadline: several must not delay the others."""
    image_jobs: int = 2
    """Images being fetched or built at once."""
    image_limit: int = 64 * GIB
    """Largest upload, bytes."""
    reserve_least: int = 256 * MIB
    """Memory the host keeps for itself, at least; else a twentieth."""
    templates: bool = False
    """After a launch that had to boot, make a template so that the next one need not. The daemon turns it on."""
    template_memory: float = 0.25
    """Share of the host's RAM that templates which were not asked for may take together."""
    template_disk: float = 0.25
    """Share of the free disk that they may take together."""
    warm: bool = False
    """Make forks of templates ahead, for launches to come. The daemon turns it on with ``templates``."""
    warm_most: int = 8
    """So many wait at most. They take their memory out of what templates may take."""
    warm_idle_s: float = 600.0
    """A template that nothing was forked from for so long has none waiting."""
    facts_s: float = 300.0
    """The host's record is looked at this often, and written only when something worth telling changed."""

    @property
    def patience(self) -> Patience:
        """What the restart policy goes by."""
        return Patience(self.backoff_s, self.backoff_most_s, self.healthy_s, self.poison)


def read(path: Path, usual: Settings | None = None) -> Settings:
    """``usual`` (else as above) as a TOML file changes it, if there is one. Raises Invalid with all that is wrong."""
    usual = usual or Settings()
    try:
        given = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return usual
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid([Problem(path.name, str(error), "a TOML file of numbers, like heartbeat_s = 2")]) from error
    problems = []
    for name, value in given.items():
        if name not in usual._fields:
            problems.append(Problem(f"{path.name}: {name}", "is not a setting", ", ".join(usual._fields)))
        elif expected := _unfit(value, getattr(usual, name)):
            problems.append(Problem(f"{path.name}: {name}", f"{value!r} cannot be meant", expected))
    if problems:
        raise Invalid(problems)
    return usual._replace(**given)


def _unfit(value: object, usual: object) -> str:
    """What would be right in place of ``value``; empty when it is."""
    if isinstance(usual, bool):
        return "" if isinstance(value, bool) else "true or false"
    whole = isinstance(usual, int)
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and 0 < value <= MOST:  # type: ignore[operator]  # a number, and nan is not above zero
        return ""
    return "a whole number above 0" if whole else "a number above 0"


MOST = 1 << 60
"""No setting means anything beyond this."""
