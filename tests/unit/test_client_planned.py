"""What a node says of blocks in its memory, read by a client, and the copies that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from kvstore import door
from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.client import planned, shared
from kvstore.client.buffers import SHARED_BYTES, Buffers
from kvstore.client.planned import Plan
from kvstore.client.shared import SharedMemory

MARK_AT, STATE, PAGE = 0, 7, 4096
_rng = np.random.default_rng(3)


def layered(*sizes: int) -> EncodedBlock:
    rows = (LayerInfo(0, 0, Distortion(0.0, 0.0)),) * len(sizes)
    return EncodedBlock.build(BlockHeader(1, 0, 1, 1, 1, 0, 1, rows, len(rows)), [_rng.bytes(size) for size in sizes])


def entry(block: EncodedBlock, runs: Sequence[tuple[int, int]], status: int = 1) -> bytes:
    header = block.header.to_bytes()
    packed = b"".join(door.RUN.pack(*run) for run in runs)
    return door.PLANNED.pack(status, len(header), len(runs), MARK_AT, STATE) + header + packed


class Node:
    """Memory with blocks in it: each begins at a page, behind the first, which has the mark; layers lie apart."""

    def __init__(self, *blocks: EncodedBlock) -> None:
        self.mapped = np.zeros(PAGE + sum(PAGE + sum(map(len, block.payload)) + PAGE * len(block.payload) for block in blocks), np.uint8)
        self.mapped[:8].view(np.uint64)[0] = STATE
        self.memory, self.blocks, self.runs = SharedMemory(self.mapped), blocks, []
        at = PAGE
        for block in blocks:
            runs = []
            for layer in filter(None, block.payload):
                self.mapped[at : at + len(layer)] = np.frombuffer(layer, np.uint8)
                half = len(layer) // 2  # as if a page ended there
                runs += [(at, half), (at + half, len(layer) - half)] if half else [(at, len(layer))]
                at += -(-len(layer) // PAGE) * PAGE
            self.runs.append(runs)

    @property
    def said(self) -> bytes:
        return b"".join(map(entry, self.blocks, self.runs))

    def read(self, count: int | None = None) -> tuple[list[EncodedBlock], str]:
        plan = Plan(self.said, len(self.blocks), self.memory)
        return plan.copy(self.memory, Buffers(0)).sound(len(self.blocks) if count is None else count, plan.damage)


def same(found: Sequence[EncodedBlock], wanted: Sequence[EncodedBlock]) -> bool:
    return [block.to_bytes() for block in found] == [block.to_bytes() for block in wanted]


SIZES = [[(64,)], [(100, 0, 60), (1,), (5000, 70_000)], [(SHARED_BYTES // 4,)] * 9, [(SHARED_BYTES // 4 + 1,)] * 3]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_come_as_they_lie_in_the_memory(sizes):
    node = Node(*(layered(*each) for each in sizes))
    found, damage = node.read()
    assert same(found, node.blocks) and not damage
    assert same(node.read(1)[0], node.blocks[:1])


def test_a_damaged_block_ends_what_is_taken_and_is_named():
    node = Node(layered(64), layered(10, 0, 20), layered(64))
    node.mapped[node.runs[1][2][0]] ^= 1
    found, damage = node.read()
    assert same(found, node.blocks[:1]) and damage == "the CRC-32C of fidelity layer 3 does not match"
    assert node.read(1)[1] == ""  # nobody asked for more
    assert node.read(0) == ([], "")


def test_a_block_that_another_was_written_over_is_gone_not_damaged():
    node = Node(layered(64), layered(64))
    node.mapped[:8] = 0
    node.mapped[node.runs[0][0][0]] ^= 1
    assert node.read() == ([], "")


def test_a_plan_ends_at_the_first_block_that_is_not_there():
    node = Node(layered(64), layered(64))
    absent = entry(layered(64), [], status=0)
    plan = Plan(entry(node.blocks[0], node.runs[0]) + absent + entry(node.blocks[1], node.runs[1]), 3, node.memory)
    assert len(plan.headers) == 1 and not plan.damage


@pytest.mark.parametrize("runs", [[], [(0, 63)], [(0, 65)], [(0, 64), (64, 1)], [(0, 0), (0, 64)], [(1 << 40, 64)]], ids=str)
def test_runs_that_are_not_the_blocks_end_the_plan(runs):
    node = Node(layered(32))
    plan = Plan(node.said + entry(layered(64), runs), 2, node.memory)
    assert plan.damage == planned.UNFIT
    assert same(plan.copy(node.memory, Buffers(0)).sound(1, "")[0], node.blocks)


class Counted(Buffers):
    """Says how much was taken."""

    taken = 0

    def take(self, size_bytes):
        self.taken += size_bytes
        return super().take(size_bytes)


def test_no_memory_is_set_aside_for_a_block_that_does_not_fit():
    node, huge, buffers = Node(layered(64)), layered(64), Counted(0)
    rows = (huge.header.rows[0]._replace(size_bytes=1 << 31),)
    lying = EncodedBlock(BlockHeader(1, 0, 1, 1, 1, 0, 1, rows, 1), huge.payload)
    for said, wanted in ((node.said, node.blocks), (b"", ())):
        plan = Plan(said + entry(lying, [(0, 64)]), len(wanted) + 1, node.memory)
        assert plan.damage == planned.UNFIT
        assert same(plan.copy(node.memory, buffers).sound(len(wanted), "")[0], wanted)
    assert buffers.taken == 64


def test_a_plan_that_is_cut_short_and_blocks_that_cannot_be_are_damage():
    node = Node(layered(64))
    for size in range(len(node.said)):
        plan = Plan(node.said[:size], 1, node.memory)
        assert plan.damage and not plan.headers and plan.copy(node.memory, Buffers(0)).sound(0, plan.damage) == ([], plan.damage)
    assert "without payload" in Plan(entry(layered(0), []), 1, node.memory).damage
    empty = layered(64, 0)
    rows = (empty.header.rows[0], empty.header.rows[1]._replace(crc32c=5))
    lying = EncodedBlock(BlockHeader(1, 0, 1, 1, 1, 0, 1, rows, 2), empty.payload)
    assert "layer 2" in Plan(entry(lying, [(0, 64)]), 1, node.memory).damage


def test_the_places_of_so_many_blocks_are_kept_in_mind_the_last_ones(monkeypatch):
    monkeypatch.setattr(shared, "MAX_PLANNED", 5)
    memory, plans = Node().memory, [SimpleNamespace(marks=np.array([(MARK_AT, STATE)], np.uint64)) for _ in range(3)]
    for _ in range(2):
        memory.remember([b"a", b"b"], plans[0])
    memory.remember([b"c", b"d", b"e"], plans[1])
    assert memory.guess([b"x", b"b"]) is plans[0] and memory.guess([b"b"]) is None
    memory.remember([b"f"], plans[2])
    assert memory.guess([b"a", b"b"]) is None
    assert memory.guess([b"c", b"d", b"e"]) is plans[1] and memory.guess([b"f"]) is plans[2]


def test_nothing_is_guessed_of_blocks_that_are_gone():
    node = Node(layered(64))
    node.memory.remember([b"a"], Plan(node.said, 1, node.memory))
    assert node.memory.guess([b"a"]) is not None
    node.mapped[:8] = 0
    assert node.memory.guess([b"a"]) is None
