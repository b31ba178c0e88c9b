"""The hand-written frames are the generated messages, in both directions; nonsense is a typed error."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvstore.errors import InvalidInputError
from kvstore.node.wire import get_frame, pack, parse_put
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

U32 = st.integers(0, 2**32 - 1)
common = settings(deadline=None, derandomize=True, max_examples=200)


@common
@given(U32, st.integers(0, 6), st.binary(max_size=300), st.lists(st.binary(max_size=200), max_size=3))
def test_a_get_frame_is_a_get_response(index: int, status: int, header: bytes, payload: list[bytes]) -> None:
    message = pb.GetResponse.FromString(get_frame(index, status, header, payload))
    assert message == pb.GetResponse(index=index, status=status, header=header, payload=b"".join(payload))


@common
@given(U32, st.none() | st.binary(min_size=1, max_size=300), st.binary(max_size=600), U32)
def test_a_put_request_is_parsed(index: int, header: bytes | None, payload: bytes, input_tokens: int) -> None:
    (frame,) = parse_put(pb.PutRequest(index=index, header=header, payload=payload, input_tokens=input_tokens).SerializeToString())
    assert (frame.index, frame.input_tokens, bytes(frame.payload)) == (index, input_tokens, payload)
    assert (None if frame.header is None else bytes(frame.header)) == header


def test_unknown_fields_and_any_order_are_accepted() -> None:
    (frame,) = parse_put(b"\x1a\x02ab" + b"\x98\x06\x01" + b"\xa2\x06\x03xyz" + b"\x1d\x01\x02\x03\x04" + b"\x61" + bytes(8) + b"\x08\x05")
    assert (frame.index, bytes(frame.payload), frame.header) == (5, b"ab", None)


@common
@example(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x08" + b"\xff" * 11)
@given(st.binary(max_size=80))
def test_any_bytes_give_a_frame_or_a_typed_error(data: bytes) -> None:
    try:
        frames = parse_put(data)
    except InvalidInputError:
        return
    assert frames
    assert sum(len(frame.payload) for frame in frames) <= len(data)


@pytest.mark.parametrize("data", [b"\x1a", b"\x1a\x05ab", b"\x08", b"\x08\xff", b"\x0b", b"\x1d\x00", b"\x02\x01a"])
def test_cut_or_malformed_frames_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInputError):
        parse_put(data)


FRAME = st.builds(pb.PutRequest, index=U32, header=st.binary(max_size=20), payload=st.binary(min_size=1, max_size=50))
FRAMES = st.lists(FRAME, min_size=1, max_size=5)


@common
@given(FRAMES, st.booleans())
def test_packed_put_frames_come_in_order(frames: list[pb.PutRequest], first_outside: bool) -> None:
    message = pb.PutRequest(more=frames)
    if first_outside:
        message = pb.PutRequest.FromString(frames[0].SerializeToString())
        message.more.extend(frames[1:])
    parsed = parse_put(message.SerializeToString())
    assert [(f.index, bytes(f.header or b""), bytes(f.payload)) for f in parsed] == [(f.index, f.header, f.payload) for f in frames]


def test_frames_are_nested_once_only() -> None:
    with pytest.raises(InvalidInputError, match="nested"):
        parse_put(pb.PutRequest(more=[pb.PutRequest(payload=b"a", more=[pb.PutRequest(payload=b"b")])]).SerializeToString())


@common
@given(st.lists(st.tuples(U32, st.integers(1, 6), st.binary(max_size=40)), min_size=1, max_size=5))
def test_packed_get_frames_are_a_get_response(frames: list[tuple[int, int, bytes]]) -> None:
    message = pb.GetResponse.FromString(pack([get_frame(index, status, b"h", [payload]) for index, status, payload in frames]))
    flat = [message, *message.more]
    assert [(f.index, f.status, f.header, f.payload) for f in flat] == [(i, s, b"h", p) for i, s, p in frames]
