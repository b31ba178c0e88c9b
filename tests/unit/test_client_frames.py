"""The hand-written frames against the generated messages, and against bytes that are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.client.frames import FRAME_BYTES, PACK_BYTES, parse_get, put_messages
from kvstore.errors import TransportError
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb


def block(*layers: bytes) -> EncodedBlock:
    rows = tuple(LayerInfo(0, 0, Distortion(0.0, 0.0)) for _ in layers)
    return EncodedBlock.build(BlockHeader(1, 0, 1, 1, 1, 0, 1, rows, len(rows)), layers)


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.binary(max_size=300), st.binary(max_size=300))
def test_get_frames_are_read_as_the_generated_code_writes_them(index, status, header, payload):
    (frame,) = parse_get(pb.GetResponse(index=index, status=status, header=header, payload=payload).SerializeToString())
    assert frame == (index, status, header, payload)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 6), st.binary(max_size=40), st.binary(max_size=40)), min_size=1, max_size=6))
def test_packed_frames_are_read_one_after_the_other(frames):
    first, *more = [pb.GetResponse(index=i, status=s, header=h, payload=p) for i, s, h, p in frames]
    first.more.extend(more)
    assert parse_get(first.SerializeToString()) == frames


def test_frames_nested_deeper_are_refused():
    deep = pb.GetResponse(more=[pb.GetResponse(more=[pb.GetResponse(index=1)])])
    with pytest.raises(TransportError, match="nested"):
        parse_get(deep.SerializeToString())


def test_fields_of_a_later_version_are_skipped():
    known = pb.GetResponse(index=3, status=1, payload=b"abc").SerializeToString()
    unknown = b"\x30\x96\x01" + b"\x39" + bytes(8) + b"\x45" + bytes(4) + b"\x4a\x02zz"
    assert parse_get(unknown + known) == [(3, 1, b"", b"abc")]


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_a_frame_or_an_error(data):
    try:
        frames = parse_get(data)
    except TransportError:
        return
    assert sum(len(frame.header) + len(frame.payload) for frame in frames) <= len(data)


@pytest.mark.parametrize("data", [b"\x08", b"\x22\x05abc", b"\x08" + b"\xff" * 11, b"\x0b", b"\x39\x00"])
def test_cut_and_malformed_frames_are_refused(data):
    with pytest.raises(TransportError):
        parse_get(data)


@pytest.mark.parametrize(
    "layers",
    [
        (b"",),
        (b"abc",),
        (b"abc", b"", b"defg"),
        (bytes(FRAME_BYTES),),
        (bytes(FRAME_BYTES - 1), b"xy"),
        (b"q" * (2 * FRAME_BYTES + 5), b"z"),
    ],
    ids=lambda layers: "+".join(str(len(layer)) for layer in layers),
)
def test_put_messages_are_the_generated_ones(layers):
    source = block(*layers)
    frames = flattened(put_messages([(source, 1000)]))
    assert [bool(f.header) for f in frames] == [True] + [False] * (len(frames) - 1)
    assert frames[0].input_tokens == 1000
    assert rebuilt(frames) == {0: source.to_bytes()}


@given(st.lists(st.integers(0, PACK_BYTES // 2), min_size=1, max_size=12))
@settings(max_examples=30)
def test_small_blocks_share_messages(sizes):
    blocks = [block(bytes([i]) * size) for i, size in enumerate(sizes)]
    messages = list(put_messages((b, 0) for b in blocks))
    assert rebuilt(flattened(messages)) == {i: b.to_bytes() for i, b in enumerate(blocks)}
    # No two neighbours would have fitted into one.
    assert all(len(a) + len(b) > PACK_BYTES for a, b in zip(messages, messages[1:], strict=False))


def flattened(messages) -> list[pb.PutRequest]:
    """The frames of serialized messages, in order, as the generated code reads them."""
    frames = []
    for message in map(pb.PutRequest.FromString, messages):
        assert sum(len(f.payload) for f in (message, *message.more)) <= FRAME_BYTES
        frames += [message, *message.more]
    return frames


def rebuilt(frames) -> dict[int, bytes]:
    """The blocks' bytes by index."""
    blobs: dict[int, bytes] = {}
    for frame in frames:
        blobs[frame.index] = blobs.get(frame.index, b"") + frame.header + frame.payload
    return blobs
