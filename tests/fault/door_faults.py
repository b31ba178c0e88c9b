"""Faults of guests of a node's door: readers of its memory that are slower than their lease, writers that stop half-way."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from unittest.mock import patch

from kvstore import door
from kvstore.block import EncodedBlock
from kvstore.client.buffers import Buffers
from kvstore.client.door import Door, open_door
from kvstore.client.staging import Stage
from kvstore.errors import ConcertinaError
from kvstore.metadata import NodeRecord

from .base import Fault
from .blocks import chain, is_one_of
from .load import listed
from .system import System

_rng = random.Random(20261124)


class LateDoor(Door):
    """Looks at what it was promised only when the lease on it is over."""

    def _copy_all(self, *args):
        time.sleep(1.3)
        return super()._copy_all(*args)


class SlowReader(Fault):
    """A reader copies from shared memory after its lease, while the pages are written anew: the node must say which are its own."""

    load = "pressure"
    way = "local"
    lasts_s = 0.0

    async def inject(self, system: System) -> None:
        record = system.living()[0]
        blocks = chain(system.fresh(), 24, 100_000)
        await system.client.flush(1.0)
        system.client.publish(blocks)
        await system.client.flush(1.0)
        here = {block.key for block in await listed(system, record)}
        known = {block.header.key: block for block in blocks if block.header.key in here}
        if not known:
            return  # admission kept them out: nothing to read
        taken: list[tuple[int, EncodedBlock]] = []
        with suppress(ConcertinaError, OSError):  # a lost or damaged block is a miss
            await asyncio.to_thread(self._read, record, known, taken)
        if not all(is_one_of(block, known) for _, block in taken):
            raise RuntimeError("a slow reader was given bytes that nobody wrote")

    @staticmethod
    def _read(record: NodeRecord, known: dict[bytes, EncodedBlock], taken: list[tuple[int, EncodedBlock]]) -> None:
        late = open_door(record, True, "", 2.0)
        late.__class__ = LateDoor
        keys = list(known)
        try:
            late.read(keys, [100_000] * len(keys), 0, lambda number, header: True, taken.extend, Buffers(1 << 24), 6.0)
        finally:
            late.close()


class StillGuest(Fault):
    """A guest sends one block whole and half of another, and then nothing for ever: its pages must not stay reserved."""

    way = "tcp"

    async def inject(self, system: System) -> None:
        record = system.living()[0]
        one, other = chain(system.fresh(), 2)
        self._guest = await asyncio.to_thread(open_door, record, False, "", 2.0)
        self._other = await asyncio.to_thread(open_door, record, False, "", 2.0)
        for guest, block, share in ((self._guest, one, 1.0), (self._other, other, 0.5)):
            request = door.message(door.Kind.PUT, door.NUMBER.pack(0), block.header.to_bytes())
            payload = b"".join(block.payload)
            guest.deadline = time.monotonic() + 2.0
            await asyncio.to_thread(guest.send, [request, payload[: int(len(payload) * share)]])


class FlipStage(Fault):
    """Bits change in the memory that writers share with a node, after they wrote and before the node has copied."""

    load = "put"
    way = "local"

    async def inject(self, system: System) -> None:
        fill = Stage._fill

        def spoil(stage: Stage, sources) -> None:
            fill(stage, sources)
            if _rng.random() < 0.3:
                stage._memory[sources[0][0] + _rng.randrange(1000)] ^= 1 << _rng.randrange(8)

        self._patch = patch.object(Stage, "_fill", spoil)
        self._patch.start()

    async def heal(self, system: System) -> None:
        self._patch.stop()
