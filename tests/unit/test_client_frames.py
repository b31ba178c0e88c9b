"""The hand-written frames against the generated messages, and against bytes that are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.client.frames import FRAME_BYTES, parse_get_frame, put_frames
from kvstore.errors import TransportError
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb


def block(*layers: bytes) -> EncodedBlock:
    rows = tuple(LayerInfo(0, 0, Distortion(0.0, 0.0)) for _ in layers)
    return EncodedBlock.build(BlockHeader(1, 0, 1, 1, 1, 0, 1, rows, len(rows)), layers)


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.binary(max_size=300), st.binary(max_size=300))
def test_get_frames_are_read_as_the_generated_code_writes_them(index, status, header, payload):
    frame = parse_get_frame(pb.GetResponse(index=index, status=status, header=header, payload=payload).SerializeToString())
    assert frame == (index, status, header, payload)


def test_fields_of_a_later_version_are_skipped():
    known = pb.GetResponse(index=3, status=1, payload=b"abc").SerializeToString()
    unknown = b"\x28\x96\x01" + b"\x31" + bytes(8) + b"\x3d" + bytes(4) + b"\x42\x02zz"
    assert parse_get_frame(unknown + known) == (3, 1, b"", b"abc")


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_a_frame_or_an_error(data):
    try:
        frame = parse_get_frame(data)
    except TransportError:
        return
    assert len(frame.header) + len(frame.payload) <= len(data)


@pytest.mark.parametrize("data", [b"\x08", b"\x22\x05abc", b"\x08" + b"\xff" * 11, b"\x0b", b"\x39\x00"])
def test_cut_and_malformed_frames_are_refused(data):
    with pytest.raises(TransportError):
        parse_get_frame(data)


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
def test_put_frames_are_the_generated_message(layers):
    source = block(*layers)
    messages = [pb.PutRequest.FromString(frame) for frame in put_frames(300, source, input_tokens=1000)]
    assert {m.index for m in messages} == {300}
    assert [bool(m.header) for m in messages] == [True] + [False] * (len(messages) - 1)
    assert messages[0].input_tokens == 1000
    assert max(len(m.payload) for m in messages) <= FRAME_BYTES
    joined = messages[0].header + b"".join(m.payload for m in messages)
    assert EncodedBlock.from_bytes(joined).to_bytes() == source.to_bytes()
