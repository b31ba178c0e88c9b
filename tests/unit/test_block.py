"""The encoded block certifies itself: any bytes give an intact block or CorruptBlockError."""

import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import SECTIONS, BlockHeader, Distortion, EncodedBlock, LayerInfo, Provenance
from kvstore.errors import CorruptBlockError, InvalidInputError

EMPTY = LayerInfo(0, 0, Distortion(0.25, 0.5), 0.125)


def make(*payload: bytes) -> EncodedBlock:
    header = BlockHeader(7, 2, 30, 3, 64, 128, 64, (EMPTY,) * len(payload), len(payload))
    return EncodedBlock.build(header, payload)


payloads = st.lists(st.binary(max_size=200), min_size=1, max_size=8)


@given(payloads)
def test_round_trip(payload):
    block = make(*payload).with_identity(b"k" * 32, b"n" * 32, b"p" * 32, Provenance(2, Distortion(0.5, 0.25)))
    again = EncodedBlock.from_bytes(block.to_bytes())
    assert again.header == block.header
    assert [bytes(p) for p in again.payload] == payload
    assert again.header.total_bytes == len(block.to_bytes())
    assert again.distortion[1] == Distortion(0.25, 0.5) and again.expected_divergence == 0.125


@given(payloads, st.data())
def test_truncation_is_a_prefix(payload, data):
    fidelity = data.draw(st.integers(1, len(payload)))
    block = EncodedBlock.from_bytes(make(*payload).truncate(fidelity).to_bytes())
    assert block.fidelities == tuple(range(1, fidelity + 1))
    assert [bytes(p) for p in block.payload] == payload[:fidelity]
    assert len(block.header.rows) == len(payload), "the rows of dropped layers stay"
    with pytest.raises(InvalidInputError):
        block.truncate(fidelity + 1)


def sectioned(layers: int, layer: bytes) -> EncodedBlock:
    header = BlockHeader(7, 2, layers, 3, 64, 128, 64, (EMPTY,), 1)
    return EncodedBlock.build(header, [bytes(i ^ b for i in range(layers) for b in layer)], sectioned=True)


@given(st.integers(4, 40), st.binary(min_size=1, max_size=9))
def test_sections_are_the_quarters_of_the_models_layers(layers, layer):
    block = EncodedBlock.from_bytes(sectioned(layers, layer).to_bytes())
    parts = [bytes(part) for number in range(SECTIONS) for part in block.section(number)]
    assert b"".join(parts) == bytes(block.payload[0])
    ends = [block.header.layers_before(number) for number in range(SECTIONS + 1)]
    assert ends[0] == 0 and ends[-1] == layers
    assert [len(part) for part in parts] == [len(layer) * (b - a) for a, b in pairwise(ends)]
    assert max(b - a for a, b in pairwise(ends)) - min(b - a for a, b in pairwise(ends)) <= 1
    for number, part in enumerate(parts):
        block.header.check_section(number, crc32c(part))
        with pytest.raises(CorruptBlockError):
            block.header.check_section(number, crc32c(part + b"x"))
    assert block.header.total_bytes == len(block.to_bytes()) and block.truncate(1) == block


@pytest.mark.parametrize(("layers", "size", "fidelities"), [(3, 30, 1), (4, 30, 1), (4, 32, 2)])
def test_what_does_not_divide_has_no_sections(layers, size, fidelities):
    header = BlockHeader(7, 2, layers, 3, 64, 128, 64, (EMPTY,) * fidelities, fidelities)
    block = EncodedBlock.build(header, [bytes(size)] * fidelities, sectioned=True)
    assert not block.header.sections and EncodedBlock.from_bytes(block.to_bytes()).header == block.header
    assert block.section(0) == block.payload and block.section(1) == ()
    assert block.header.section(0) == (0, block.header.payload_bytes) and block.header.section(1) == (0, 0)
    with pytest.raises(CorruptBlockError):
        BlockHeader.from_bytes(replace(block.header, sections=(1, 2, 3, 4)).to_bytes())


@given(st.data())
def test_one_flipped_bit_of_a_block_with_sections_is_noticed(data):
    blob = bytearray(sectioned(5, b"abc").to_bytes())
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(blob)


@given(st.binary(max_size=400))
def test_any_bytes_at_all(blob):
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(blob)


@settings(max_examples=400)
@given(payloads, st.data())
def test_one_flipped_bit_is_always_noticed(payload, data):
    blob = bytearray(make(*payload).to_bytes())
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(blob)


@given(payloads, st.data())
def test_cut_or_lengthened(payload, data):
    blob = make(*payload).to_bytes()
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(blob[: data.draw(st.integers(0, len(blob) - 1))])
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(blob + b"\0")


def sealed(mutate) -> bytes:
    """A header with a right CRC over wrong fields, as a hostile peer would send it."""
    blob = bytearray(make(b"abc").to_bytes())
    mutate(blob)
    (size,) = struct.unpack_from("<H", blob, 6)
    struct.pack_into("<I", blob, 8, crc32c(bytes(blob[12:size])))
    return bytes(blob)


@pytest.mark.parametrize(
    ("offset", "format_", "value"),
    [(15, "<B", 0), (15, "<B", 9), (16, "<B", 0), (16, "<B", 2), (17, "<B", 1), (18, "<H", 0), (28, "<I", 0), (28, "<I", 1 << 20),
     (169, "<I", 1 << 31)],
    ids=["no layers", "too many", "none present", "gap", "flags", "no model layers", "no tokens", "too many tokens", "payload too large"],
)  # fmt: skip
def test_hostile_header_with_a_right_crc(offset, format_, value):
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(sealed(lambda blob: struct.pack_into(format_, blob, offset, value)))


def test_digests_are_never_cut():
    with pytest.raises(InvalidInputError):
        make(b"a").with_identity(b"short", b"n" * 32, b"p" * 32)


def test_provenance_knows_exactness():
    assert Provenance().exact and not Provenance(1, Distortion(0.0, 1e-9)).exact
    assert replace(make(b"a").header, provenance=Provenance(1, Distortion(0.0, 1e-9))).provenance.fidelity == 1


@pytest.mark.parametrize("blob", [None, 3, "text", [1, 2]])
def test_what_is_no_bytes_is_refused_by_name(blob):
    with pytest.raises(InvalidInputError, match=type(blob).__name__):
        EncodedBlock.from_bytes(blob)


@pytest.mark.parametrize("fidelity", ["x", None, 1.5, 0, 3])
def test_a_fidelity_that_is_none_is_refused(fidelity):
    with pytest.raises(InvalidInputError, match="fidelity"):
        make(b"a", b"b").truncate(fidelity)
