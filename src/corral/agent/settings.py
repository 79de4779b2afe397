"""The agent's constants, each with its reason; tests and the simulator choose others."""

from __future__ import annotations

from typing import NamedTuple

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
    facts_s: float = 300.0
    """The host's record is looked at this often, and written only when something worth telling changed."""
