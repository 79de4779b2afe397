"""corral-guest with sanitizers under garbage and mutated frames: it must neither crash nor stop to listen."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.guest.frames import HEADER, MAGIC, MARK, Decoder, Field, Type, encode, encode_fields
from tests.integration.agent_on_host import Agent, sanitized, start_agent

HELLO = MARK + encode(Type.HELLO, 0, b"n" * 16 + b"\1\0")
PROGRAMS = st.sampled_from([[b"cat"], [b"true"], [b"sh", b"-c", b"echo x; exit 3"], [b"/dev/null"], [b""]])
WORDS = st.binary(max_size=40)

exec_payloads = st.builds(
    lambda argv, rest: encode_fields([(Field.ARG, a) for a in argv] + rest),
    PROGRAMS,
    st.lists(st.tuples(st.sampled_from([Field.ENV, Field.CWD, Field.USER, Field.TTY, Field.SEED]), WORDS), max_size=3),
)
CHANNELS = st.integers(0, 4)
valid = st.one_of(
    st.builds(lambda c, p: encode(Type.EXEC, c, p), CHANNELS, exec_payloads),
    st.builds(
        lambda t, c, p: encode(t, c, p),
        st.sampled_from([t for t in Type if t is not Type.EXEC]),
        CHANNELS,
        st.one_of(st.binary(max_size=64), st.just(bytes(32768)), st.just(b"\1\0\0\0")),
    ),
    st.just(HELLO),
    st.just(MARK),
)
broken = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda n, c, t: HEADER.pack(n, c, t, MAGIC), st.integers(0, 2**32 - 1), CHANNELS, st.integers(0, 255)),
    st.builds(lambda frame, at: frame[: at % (len(frame) + 1)], valid, st.integers(0, 40000)),
    st.builds(
        lambda frame, at, bit: bytes(b ^ (1 << bit if i == at % len(frame) else 0) for i, b in enumerate(frame)),
        st.builds(lambda c: encode(Type.RESIZE, c, b"\1\0\1\0"), CHANNELS),
        st.integers(0, 200),
        st.integers(0, 7),
    ),
)
streams = st.lists(st.one_of(valid, valid, broken), max_size=25)


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    binary = sanitized()
    if binary is None:
        pytest.skip("no compiler with address and undefined-behaviour sanitizers here (install gcc)")
    one = start_agent(binary)
    yield one
    status = one.stop()
    assert status == 0, one.process.stderr and one.process.stderr.read().decode()


def push(ours: socket.socket, data: bytes, *, until: bytes = b"") -> bool:
    """Send all, reading (and dropping) what comes back; then read until a WELCOME for ``until`` comes."""
    decoder, view, end = Decoder(), memoryview(data), time.monotonic() + 20
    while time.monotonic() < end:
        readable, writable, _ = select.select([ours], [ours] if view else [], [], 1)
        if writable:
            view = view[ours.send(view[:65536], socket.MSG_DONTWAIT) :]
        if readable:
            piece = ours.recv(1 << 18, socket.MSG_DONTWAIT)
            if not piece:
                return False
            decoder.feed(piece)
            for frame in decoder:
                if until and frame.type == Type.WELCOME and frame.payload.startswith(until):
                    return True
        if not view and not until:
            return True
    return False


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(streams, min_size=1, max_size=2), st.booleans())
def test_whatever_is_sent_a_hello_is_answered(agent: Agent, sent: list[list[bytes]], greeted: bool) -> None:
    for stream in sent:
        push(agent.ours, (HELLO if greeted else b"") + b"".join(stream))
    nonce = b"sync%012d" % (time.monotonic_ns() % 10**12)
    pad = bytes(HEADER.size + 65536)
    answered = push(agent.ours, pad + MARK + encode(Type.HELLO, 0, nonce + b"\1\0"), until=nonce)
    if agent.process.poll() is not None:
        assert agent.process.stderr is not None
        pytest.fail(f"the agent died: {agent.process.stderr.read().decode()[-4000:]}")
    assert answered, "the agent did not answer"
