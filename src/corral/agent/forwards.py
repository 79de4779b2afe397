"""Ports of the host that lead into guests: which there shall be, chosen once, kept over restarts, free when used."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from corral.agent.ports import PortProbe
from corral.errors import Refused, Unavailable
from corral.model import Vm
from corral.model.vm import Port
from corral.runtime import Random

FIRST, LAST = 20000, 29999
"""Chosen ports lie here: below the kernel's own range for outgoing connections, so nobody takes one by chance."""

TRIES = 200


class SocketProbe:
    """Asks the kernel, by binding."""

    def free(self, protocol: str, address: str, port: int) -> bool:
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, kind) as probe:
            # As QEMU does: without it a connection that was just closed would make a port look taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(protocol == "tcp"))
            try:
                probe.bind((address, port))
                if protocol == "tcp":
                    probe.listen(1)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL, errno.EPERM):
                    return False
                raise Unavailable(f"cannot look at port {port}: {error.strerror}") from error
        return True


def taken_by(vms: Iterable[Vm], without: str) -> set[tuple[str, int]]:
    """(protocol, port) of all other VMs here, whether they run or not: theirs are kept for them."""
    return {(p.protocol, p.host) for vm in vms if vm.meta.id != without for p in vm.status.ports if p.host}


def wanted(vm: Vm, *, ssh: bool) -> list[Port]:
    """The forwards a VM shall have; ``host`` 0 where Corral chooses."""
    ports = [
        Port(host=f.host, guest=f.guest, protocol=f.protocol, address=f.address)
        for nic in vm.spec.nics
        for f in nic.publish
    ]
    if ssh and vm.spec.nics:
        ports.append(Port(host=0, guest=22, protocol="tcp", address="127.0.0.1", purpose="ssh"))
    return ports


def allot(vm: Vm, taken: set[tuple[str, int]], probe: PortProbe, random: Random, *, ssh: bool) -> tuple[Port, ...]:
    """The VM's forwards with every port chosen and free. What it had before is kept where that is possible.

    Raises Refused ``in-use`` when a port that was asked for by number is taken.
    """
    had = {(p.purpose, p.protocol, p.address, p.guest): p.host for p in vm.status.ports}
    mine: set[tuple[str, int]] = set()
    found = []
    for port in wanted(vm, ssh=ssh):
        number = port.host or had.get((port.purpose, port.protocol, port.address, port.guest), 0)
        busy = (port.protocol, number) in taken | mine or (
            number != 0 and not probe.free(port.protocol, port.address, number)
        )
        if port.host and busy:
            raise Refused(
                f"port {number} of {port.address} is taken ({port.protocol})",
                code="in-use", field="ports",
                hint="stop what listens there, publish another port, or let Corral choose with host port 0",
            )  # fmt: skip
        if not number or busy:
            number = _choose(port, taken | mine, probe, random)
        mine.add((port.protocol, number))
        found.append(Port(host=number, guest=port.guest, protocol=port.protocol, address=port.address,
                          purpose=port.purpose))  # fmt: skip
    return tuple(found)


def _choose(port: Port, taken: set[tuple[str, int]], probe: PortProbe, random: Random) -> int:
    for _ in range(TRIES):
        number = FIRST + random.below(LAST - FIRST + 1)
        if (port.protocol, number) not in taken and probe.free(port.protocol, port.address, number):
            return number
    raise Unavailable(f"no free port was found between {FIRST} and {LAST} on {port.address}")
