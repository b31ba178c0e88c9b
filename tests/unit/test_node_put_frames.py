"""Whatever frames a writer sends, nothing leaks and every visible block is intact."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.arena import PageAllocator, create
from kvstore.block import EncodedBlock
from kvstore.clock import ManualClock
from kvstore.errors import InvalidInputError
from kvstore.eviction import create as create_policy
from kvstore.metadata import NodeRecord
from kvstore.metrics import Metrics
from kvstore.node.config import NodeConfig
from kvstore.node.copier import Copier
from kvstore.node.engine import NodeEngine
from kvstore.node.handlers.base import Service
from kvstore.node.handlers.put import Incoming
from kvstore.node.status import Status
from kvstore.node.wire import PutFrame
from tests.node_support import block

PAGE, PAGES = 512, 16
BLOCKS = [block(n, sizes) for n, sizes in enumerate([(300,), (700, 900), (1, 1, 1), (5000,), (PAGE * PAGES + 1,)])]


@st.composite
def frame(draw: st.DrawFn) -> PutFrame:
    """A frame of a real block, cut, shifted or damaged now and then."""
    one = draw(st.sampled_from(BLOCKS))
    data, header = b"".join(one.payload), bytearray(one.header.to_bytes())
    if draw(st.integers(0, 9)) == 0:
        header[draw(st.integers(0, len(header) - 1))] ^= 1 << draw(st.integers(0, 7))
    start = draw(st.sampled_from([0, 0, 0, 300, 700]))
    stop = draw(st.sampled_from([len(data), len(data), len(data), 300, 700, len(data) + 1]))
    piece = bytearray((data + b"x")[start:stop])
    if piece and draw(st.integers(0, 9)) == 0:
        piece[draw(st.integers(0, len(piece) - 1))] ^= 1
    has_header = start == 0 or draw(st.booleans())
    return PutFrame(draw(st.integers(-1, 1)), memoryview(bytes(header)) if has_header else None, memoryview(bytes(piece)), 0)


def service() -> Service:
    arena = create(PAGES * PAGE, page_bytes=PAGE)
    engine = NodeEngine(NodeConfig(arena=PAGES * PAGE, page_bytes=PAGE), ManualClock(), create_policy("lru"), PageAllocator(PAGES))
    return Service(engine, arena, Copier(arena), Metrics(), NodeRecord("n", "0" * 16, ""))


async def send(to: Service, frames: list[PutFrame]) -> list[Status]:
    """One Put stream. A frame's index is an offset to the one that is due."""
    incoming = Incoming(to)
    try:
        for one in frames:
            due = len(incoming.statuses) + (one.header is not None and incoming.open)
            await incoming.take(one._replace(index=max(0, due + (one.index if one.index < 0 else 0))))
        incoming.finish()
    finally:
        incoming.abandon()
    return incoming.statuses


@settings(max_examples=300)
@given(st.lists(st.lists(frame(), max_size=6), min_size=1, max_size=4))
def test_any_frames_leave_a_whole_account_and_intact_blocks(streams: list[list[PutFrame]]) -> None:
    node = service()
    known = {b.header.key: b for b in BLOCKS}
    for frames in streams:
        with suppress(InvalidInputError):
            statuses = asyncio.run(send(node, frames))
            assert len(statuses) == sum(one.header is not None for one in frames)
        assert node.engine.reserved_bytes == 0
        node.engine.check()
        for entry in node.engine.table:
            layers = zip(entry.header.rows, entry.layers, strict=False)
            pieces = [piece for row, extents in layers for piece in node.arena.read(extents, 0, row.size_bytes)]
            stored = EncodedBlock.verify(entry.header, b"".join(pieces))
            assert stored.to_bytes() == known[entry.key].truncate(entry.header.present).to_bytes()
    node.copier.close()
    node.arena.close()
