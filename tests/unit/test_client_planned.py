"""What a node says of blocks in its memory, read by a client."""

from __future__ import annotations

import pytest

from kvstore import door
from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.client.planned import certified, parse_plan
from kvstore.errors import CorruptBlockError


def layered(sizes: tuple[int, ...]) -> EncodedBlock:
    rows = (LayerInfo(0, 0, Distortion(0.0, 0.0)),) * len(sizes)
    return EncodedBlock.build(BlockHeader(1, 0, 1, 1, 1, 0, 1, rows, len(rows)), [bytes(range(size)) for size in sizes])


def entry(block: EncodedBlock, runs: list[tuple[int, int]], status: int = 1) -> bytes:
    header = block.header.to_bytes()
    packed = b"".join(door.RUN.pack(*run) for run in runs)
    return door.PLANNED.pack(status, len(header), len(runs), 64, 7) + header + packed


def answer(*entries: bytes) -> bytes:
    return door.NUMBER.pack(1) + b"".join(entries)


def crcs(block: EncodedBlock) -> list[int]:
    return [row.crc32c for row in block.header.rows if row.size_bytes]


def test_a_plan_says_what_is_to_be_copied_for_each_layer():
    block = layered((100, 0, 60))
    (planned,) = parse_plan(answer(entry(block, [(0, 64), (4096, 36), (8192, 60)])), 1)
    assert planned.header == block.header and planned.mark == (64, 7) and planned.stop == 8252
    assert planned.runs == [(0, 0, 64, False), (64, 4096, 36, True), (100, 8192, 60, False)]
    payload = memoryview(b"".join(block.payload))
    assert [bytes(part) for part in planned.parts(payload)] == [bytes(part) for part in block.payload]
    first, last = crcs(block)
    assert certified([planned], [1, first, last]) == (1, "")
    assert certified([planned, planned], [1, first, last, 1, first, last ^ 1]) == (1, "the CRC-32C of fidelity layer 3 does not match")


def test_a_plan_ends_at_the_first_block_that_is_not_there():
    block = layered((64,))
    there, absent = entry(block, [(0, 64)]), entry(block, [], status=0)
    assert len(list(parse_plan(answer(there, absent, there), 3))) == 1


@pytest.mark.parametrize("runs", [[], [(0, 63)], [(0, 65)], [(0, 64), (64, 1)], [(0, 0), (0, 64)]], ids=str)
def test_runs_that_are_not_the_blocks_are_refused(runs):
    with pytest.raises(CorruptBlockError, match="does not fit"):
        list(parse_plan(answer(entry(layered((64,)), runs)), 1))


def test_a_plan_that_is_cut_short_and_a_block_without_payload_are_refused():
    whole = answer(entry(layered((64,)), [(0, 64)]))
    for size in range(len(whole)):
        with pytest.raises(CorruptBlockError):
            list(parse_plan(whole[:size], 1))
    with pytest.raises(CorruptBlockError, match="without payload"):
        list(parse_plan(answer(entry(layered((0,)), [])), 1))
