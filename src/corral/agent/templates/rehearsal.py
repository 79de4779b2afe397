"""What a fork does before it waits in the warm pool: it goes through its first moments once, as nobody.

Under emulation each piece of the guest's code is translated when it first runs, which is most of what a fork's first
moments take, and what was translated stays with the process. So one that is made ahead runs for a moment with its
cables out: it is told who it is, its services see the clock jump, a program is run. All of that happens again, fast,
when a VM gets it: the identity that counts is the one after that (:mod:`corral.agent.templates.welcome`).
"""

from __future__ import annotations

from corral.agent.ports import Joined
from corral.agent.templates.boot import HOSTNAME
from corral.agent.templates.welcome import with_network
from corral.engine.protocol import Channels
from corral.errors import CorralError
from corral.guest.protocol import Command, Ended, Guest, Identity
from corral.host.hostkey import HostKey
from corral.model import Vm
from corral.runtime import Runtime, deadline

REHEARSAL_S = 20.0
"""Half a second, but on a host that is very busy."""
PROGRAM = Command(argv=("true",), processes=1000)
"""Any will do. Most programs of throw-away VMs have a limit of processes, which takes the guest a way of its own."""


async def rehearse(joined: Joined, channels: Channels, rt: Runtime, vm: Vm, key: HostKey) -> None:
    """Go through it with the guest of a machine that runs. ``vm``: what it may become, with ``key``.

    Raises CorralError: it is no use then.
    """
    async with deadline(REHEARSAL_S, "the rehearsal of a fork made ahead"):
        guest = await joined.connect_guest(channels.guest, channels.qga, rt, prefer="resident")
        try:
            await guest.identify(_somebody(rt, vm, key))
            await _run(guest)
        finally:
            await guest.close()


def _somebody(rt: Runtime, vm: Vm, key: HostKey) -> Identity:
    """As much as a VM will be told, so that nothing is new to the guest then."""
    identity = Identity(
        time=rt.clock.now(), seed=rt.random.token(32), hostname=HOSTNAME, machine_id=vm.meta.id.replace("-", ""),
        ssh_host_key=key.private, ssh_host_key_public=key.public, authorized_keys=b"",
    )  # fmt: skip
    return with_network(identity, vm)


async def _run(guest: Guest) -> None:
    try:
        process = await guest.run(PROGRAM)
    except CorralError as error:
        if error.code != "guest":
            raise
        return  # an image without `true`: the guest has gone the same way up to there
    try:
        async for piece in process.output():
            if isinstance(piece, Ended):
                return
    finally:
        await process.close()
