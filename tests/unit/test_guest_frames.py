"""The codec between Corral and corral-guest."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.errors import CorralError
from corral.guest.frames import (
    HEADER,
    MAGIC,
    MARK,
    MAX_HUNT,
    MAX_PAYLOAD,
    Decoder,
    Field,
    Frame,
    Type,
    decode_fields,
    encode,
    encode_fields,
)

frames = st.builds(Frame, st.sampled_from(list(Type)), st.integers(0, 2**32 - 1), st.binary(max_size=300))


def settled() -> Decoder:
    decoder = Decoder()
    decoder.settle()
    return decoder


def cut(data: bytes, points: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(point % (len(data) + 1) for point in points)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 5000), max_size=20))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(sent: list[Frame], points: list[int]) -> None:
    decoder, got = settled(), []
    stream = b"".join(encode(Type(f.type), f.channel, f.payload) for f in sent)
    for piece in cut(stream, points):
        decoder.feed(piece)
        got += list(decoder)
    assert got == sent


@given(st.binary(max_size=2000), st.lists(st.integers(0, 5000), max_size=20))
def test_a_hunting_decoder_finds_the_welcome_behind_any_leftovers(leftovers: bytes, points: list[int]) -> None:
    decoder, got = Decoder(), []
    for piece in cut(leftovers + MARK + encode(Type.WELCOME, 0, b"n" * 34), points):
        decoder.feed(piece)
        got += list(decoder)
    assert got[-1] == Frame(Type.WELCOME, 0, b"n" * 34)


@pytest.mark.parametrize(
    "leftovers",
    [
        MARK,
        MARK[:7],
        MARK + MARK[:15],
        MARK + encode(Type.WELCOME, 0, b"o" * 34)[:20],
        MARK + HEADER.pack(60000, 1, Type.STDOUT, MAGIC),
        MARK + encode(Type.ANNOUNCE, 0, b"o" * 16),
    ],
)
def test_leftovers_that_look_like_a_greeting_do_no_harm(leftovers: bytes) -> None:
    decoder = Decoder()
    decoder.feed(leftovers + MARK + encode(Type.WELCOME, 0, b"n" * 34))
    assert list(decoder)[-1] == Frame(Type.WELCOME, 0, b"n" * 34)


def test_after_the_greeting_the_stream_goes_on_at_the_next_frame() -> None:
    decoder, got = Decoder(), []
    decoder.feed(b"junk" + MARK + encode(Type.WELCOME, 0, b"n" * 34) + encode(Type.REPLY, 7, b"x"))
    for frame in decoder:
        decoder.settle()
        got.append(frame)
    assert got[-1] == Frame(Type.REPLY, 7, b"x")


def test_a_payload_may_contain_the_mark() -> None:
    decoder = settled()
    decoder.feed(encode(Type.STDOUT, 1, MARK * 3) + MARK + encode(Type.EXIT, 1, b"\0"))
    assert list(decoder) == [Frame(Type.STDOUT, 1, MARK * 3), Frame(Type.EXIT, 1, b"\0")]


@pytest.mark.parametrize(
    "garbage", [b"\0" * 12, HEADER.pack(MAX_PAYLOAD + 1, 0, 1, MAGIC), HEADER.pack(1, 0, 1, b"XXX"), b"\xffnot a mark!"]
)
def test_what_is_no_frame_is_a_violation(garbage: bytes) -> None:
    decoder = settled()
    decoder.feed(garbage)
    with pytest.raises(CorralError) as caught:
        list(decoder)
    assert caught.value.code == "guest"


def test_a_flood_of_garbage_is_not_searched_for_ever() -> None:
    decoder = Decoder()

    def flood() -> None:
        for _ in range(MAX_HUNT // 65536 + 2):
            decoder.feed(b"\xff" * 65536)
            list(decoder)

    with pytest.raises(CorralError, match="flood"):
        flood()


@given(st.lists(st.tuples(st.sampled_from(list(Field)), st.binary(max_size=100))))
def test_fields_come_back(fields: list[tuple[Field, bytes]]) -> None:
    assert list(decode_fields(encode_fields(fields))) == fields


@given(st.binary(max_size=200))
def test_malformed_fields_are_a_violation_and_nothing_else(payload: bytes) -> None:
    try:
        assert sum(5 + len(data) for _, data in decode_fields(payload)) == len(payload)
    except CorralError as error:
        assert error.code == "guest"  # noqa: PT017 - either is right, nothing third
