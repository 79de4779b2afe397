"""What a fork must have in common with its template, and what may be its own. Pure; both engines use it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from corral.engine.protocol import Card, Drive, KernelBoot, Limits, Machine

NOBODY = "00000000-0000-4000-8000-000000000000"
_MAC = "52:54:00:00:00:00"


def common(machine: Machine) -> Machine:
    """The machine without what each fork has of its own: names, addresses, ports, files, the kernel's command line.

    Two machines that are equal then have the same virtual hardware: the state of one can be loaded into the other.
    (A kernel that was booted directly lies in guest memory; which one the next boot takes is no hardware.)
    """
    kernel = None if machine.kernel is None else KernelBoot(kernel=Path("/kernel"))
    return msgspec.structs.replace(
        machine,
        id=NOBODY,
        name="",
        epoch=0,
        kernel=kernel,
        drives=tuple(_drive(drive) for drive in machine.drives),
        cards=tuple(_card(card) for card in machine.cards),
        joins=(),
        template=None,
    )


def serves(warm: Machine, wanted: Machine) -> bool:
    """Whether a process that was made as ``warm`` and never ran can become ``wanted``: the same files, and nothing else
    but what can be given to a process, or lies in the memory of its template anyhow.
    """
    return not any(card.forwards for card in warm.cards) and _ungiven(warm) == _ungiven(wanted)


def _ungiven(machine: Machine) -> Machine:
    kernel = None if machine.kernel is None else msgspec.structs.replace(machine.kernel, cmdline="")
    drives = tuple(msgspec.structs.replace(drive, limits=Limits()) for drive in machine.drives)
    cards = tuple(msgspec.structs.replace(card, hostname="", forwards=()) for card in machine.cards)
    return msgspec.structs.replace(machine, name="", epoch=0, kernel=kernel, drives=drives, cards=cards)


def _drive(drive: Drive) -> Drive:
    # A disk's format and limits are the host's business: a fork's is always qcow2, its template's may have been raw.
    return msgspec.structs.replace(drive, path=Path(f"/{drive.name}"), format="raw", layers=(), limits=Limits())


def _card(card: Card) -> Card:
    return msgspec.structs.replace(card, mac=_MAC, hostname="", forwards=())
