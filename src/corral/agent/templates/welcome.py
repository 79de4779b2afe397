"""Tells a fork who it is, and only then plugs in its network cable.

Until then it is its template's twin: the same keys, the same numbers to come from its random generator, the same
address. One message with everything, because each round trip of a guest that has just woken costs milliseconds. What
fails leaves the cable out and is tried again; nobody outside ever meets the twin.
"""

from __future__ import annotations

from collections.abc import Callable

from corral.agent.events import EventLog
from corral.agent.machine import hostname_of
from corral.agent.picture import Picture
from corral.agent.ports import Joined
from corral.agent.templates.scripts import LEAVE, RUN_HOOKS, run
from corral.engine.protocol import Engine
from corral.guest.protocol import Guest, Identity
from corral.model import Vm
from corral.model.vm import start_of
from corral.runtime import Runtime

ADDRESS, GATEWAY, DNS = "10.0.2.15/24", "10.0.2.2", "10.0.2.3"
"""What a guest has behind QEMU's own NAT: published ports lead to this address. Leases of the template are no good, the
pretended DHCP server in QEMU remembers its card and would give another one."""
IDENTIFY_S = 20.0
SCRIPT_S = 60.0
QGA = "qemu-guest-agent"


class Welcome:
    """Called with each fork's guest at its first answer.

    Args:
        keys: the public keys that may log in to a VM.
        template: a template's record; None when it is gone.
    """

    def __init__(
        self, engine: Engine, joined: Joined, rt: Runtime, *, picture: Picture, events: EventLog,
        keys: Callable[[Vm], tuple[str, ...]],
    ) -> None:  # fmt: skip
        self._engine, self._joined, self._rt = engine, joined, rt
        self._picture, self._events, self._keys = picture, events, keys

    async def __call__(self, vm_id: str, guest: Guest) -> None:
        """Make the guest somebody. Raises CorralError: it is not yet, its cable is out; call again."""
        vm = self._picture.vms[vm_id]
        memory = self._picture.of(vm_id)
        memory.mark("answer", self._rt.clock.now() - vm.meta.created)
        start = start_of(vm)
        template = self._picture.templates.get(start.template_id)
        if start.source:
            await run(guest, LEAVE, SCRIPT_S, "letting go of the parent's network")
        await guest.identify(await self.identity(vm), IDENTIFY_S)
        memory.mark("identity", self._rt.clock.now() - vm.meta.created)
        await self._rt.faults.at("fork.identified")
        if start.source or template is None or template.status.hooks:
            await run(guest, RUN_HOOKS, SCRIPT_S, "the image's on-fork programs")
        for number in range(len(vm.spec.nics)):
            await self._engine.link(vm_id, f"net{number}", True)
        await self._rt.faults.at("fork.linked")
        if template is not None and template.status.agent == QGA:
            self._tell_what_is_left(vm)

    async def identity(self, vm: Vm) -> Identity:
        """Everything that must be a VM's own."""
        memory = self._picture.of(vm.meta.id)
        key = memory.host_key = memory.host_key or await self._joined.host_key()
        authorized = "".join(f"{line.strip()}\n" for line in self._keys(vm)).encode()
        identity = Identity(
            time=self._rt.clock.now(), seed=self._rt.random.token(32), hostname=hostname_of(vm),
            machine_id=vm.meta.id.replace("-", ""), ssh_host_key=key.private, ssh_host_key_public=key.public,
            authorized_keys=authorized or None,
        )  # fmt: skip
        return with_network(identity, vm)

    def _tell_what_is_left(self, vm: Vm) -> None:
        text = (
            "identified through qemu-guest-agent: clock, random generator, host name, machine-id, ed25519 host key, "
            "root's keys and the address are its own; other host keys, other users' keys and what programs keep in "
            "memory are the template's"
        )
        self._events.emit(vm, "PartlyIdentified", text, "warning")


def with_network(identity: Identity, vm: Vm) -> Identity:
    """The identity with the address of the VM's card, if it has one."""
    if not vm.spec.nics:
        return identity
    return Identity(
        time=identity.time, seed=identity.seed, hostname=identity.hostname, machine_id=identity.machine_id,
        ssh_host_key=identity.ssh_host_key, ssh_host_key_public=identity.ssh_host_key_public,
        authorized_keys=identity.authorized_keys, mac=vm.spec.nics[0].mac, address=ADDRESS, gateway=GATEWAY, dns=(DNS,),
    )  # fmt: skip
