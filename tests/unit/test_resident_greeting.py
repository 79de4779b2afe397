"""How corral-guest's other end begins, against an agent that this test plays."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from corral.guest.frames import HEADER, MARK, NONCE_SIZE, Type, encode
from corral.guest.resident import PAD_AT, Resident
from corral.runtime import Runtime

PROTOCOL = struct.pack("<H", 1)


def nonces(heard: bytes) -> list[bytes]:
    """Of each hello that is complete."""
    pieces = [piece[HEADER.size :] for piece in heard.split(MARK)[1:]]
    return [piece[:NONCE_SIZE] for piece in pieces if len(piece) >= NONCE_SIZE + 2]


async def test_an_agent_that_was_slow_and_gives_up_at_the_pad_is_greeted_by_the_hello_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # QEMU takes what is said into the guest's memory long before a guest that stands still can read it.
    monkeypatch.setattr("corral.guest.resident.all_taken", lambda writer: True)
    ours, its = socket.socketpair()
    its.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    guest, heard, loop = Resident(reader, writer, Runtime()), b"", asyncio.get_running_loop()
    greeting = asyncio.create_task(guest.greet())
    while len(nonces(heard)) < PAD_AT:
        heard += await loop.sock_recv(its, 1 << 17)

    async def say(type_: Type, payload: bytes) -> None:
        await loop.sock_sendall(its, MARK + encode(type_, 0, payload))
        await asyncio.sleep(0.02)

    instance = bytes(NONCE_SIZE)
    await say(Type.WELCOME, nonces(heard)[0] + instance + PROTOCOL)
    await say(Type.VIOLATION, b"not a frame")
    assert guest.lost is None
    assert not greeting.done()
    await say(Type.WELCOME, nonces(heard)[PAD_AT - 1] + instance + PROTOCOL)
    await asyncio.wait_for(greeting, 5)
    assert guest.lost is None
    await guest.close()
    its.close()
