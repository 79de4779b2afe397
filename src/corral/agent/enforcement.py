"""How what VMs are given is enforced on this host, resource by resource, in words; and what is missing."""

from __future__ import annotations

from typing import NamedTuple

from corral.agent.ports import Groups


class Enforced(NamedTuple):
    """``whole``: nothing is missing here that another host could have."""

    resource: str
    whole: bool
    how: str


DISK = "each disk's requests and bytes a second by QEMU's throttle, with bursts; disks have no shares among each other"
NIC = "user-mode networking can neither limit nor count what goes through a card"


def enforcement(groups: Groups) -> tuple[Enforced, ...]:
    """For `corral doctor` and the host's record."""
    cpu = groups.describe()
    if groups.shares:
        cpu = f"weights, limits and reservations by {cpu}"
    return (
        Enforced("cpu", groups.shares, cpu),
        Enforced("memory", groups.limits_memory, _memory(groups)),
        Enforced("disk", True, DISK),
        Enforced("nic", True, NIC),
    )  # fmt: skip


def _memory(groups: Groups) -> str:
    given = "admission counts all that is given; under pressure balloons take back what guests do not use"
    if groups.limits_memory:
        return f"{given}; a control group's limit far above holds a QEMU that takes more"
    return f"{given}; nothing holds a QEMU that takes more: there is no memory controller to write"
