"""What clients do while a fault lasts, each answer judged at once: whose bytes they are, and whether it came by its deadline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any

from kvstore.block import EncodedBlock
from kvstore.errors import ConcertinaError

from .base import Outcome
from .blocks import NAMESPACE, chain, is_one_of
from .system import System

LOOKUP_S, FETCH_S, FLUSH_S = 0.25, 0.6, 2.0
#: A busy machine wakes a caller late; a call is a hang when it is later than its deadline by more than this.
SLACK_S = 1.0
#: Load -> writers, blocks of each prompt that they write, pause after it, readers.
LOADS = {"mixed": (1, 12, 0.05, 1), "put": (2, 12, 0.0, 1), "get": (0, 0, 0.0, 2), "pressure": (2, 36, 0.0, 1)}


class Load:
    """Readers and writers of one repetition. `outcome` collects the verdicts."""

    def __init__(self, system: System, outcome: Outcome) -> None:
        self.system = system
        self.outcome = outcome
        self.known: dict[bytes, EncodedBlock] = {}
        self.prompts: list[list[bytes]] = []
        self.pins: dict[bytes, str] = {}  # key -> incarnation of the node that acknowledged its pin
        self._held: deque[list[EncodedBlock]] = deque(maxlen=6)  # kept by their reader while others arrive
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, kind: str) -> None:
        """Begin; `kind` as in `Fault.load`."""
        writers, blocks, pause_s, readers = LOADS[kind]
        loops = [self._write_on(blocks, pause_s) for _ in range(writers)] + [self._read_on() for _ in range(readers)]
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        """End, and let the queue run dry."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                self.outcome.blame("unhealthy", f"the client raised {result!r}")
        for block in (block for blocks in self._held for block in blocks):
            if not is_one_of(block, self.known):
                self.outcome.blame("wrong", "a block that was right when it came has changed since")
        await self._timed("flush", FLUSH_S, self.system.client.flush(FLUSH_S))

    async def write(self, blocks: int) -> list[bytes]:
        """Publish a new prompt. Returns its keys."""
        new = chain(self.system.fresh(), blocks)
        self.known |= {block.header.key: block for block in new}
        keys = [block.header.key for block in new]
        self.prompts.append(keys)
        self.system.client.publish(new, input_tokens=4 * blocks)
        await self._timed("flush", FLUSH_S, self.system.client.flush(FLUSH_S))
        return keys

    async def read(self, keys: list[bytes]) -> int:
        """Look up and fetch a prompt. Returns how many blocks came, all of them judged."""
        hits = await self._timed("lookup", LOOKUP_S, self.system.client.lookup(keys, deadline_s=LOOKUP_S))
        fetched = await self._timed("fetch", FETCH_S, self.system.client.fetch(hits, namespace=NAMESPACE, deadline_s=FETCH_S))
        for at, block in enumerate(fetched.blocks):
            if block.header.key != keys[at] or not is_one_of(block, self.known):
                self.outcome.blame("wrong", "a block has bytes that nobody wrote under its key")
        self._held.append(fetched.blocks)
        self.outcome.served += len(fetched.blocks)
        self.outcome.missed += len(keys) - len(fetched.blocks)
        return len(fetched.blocks)

    async def pin(self, keys: list[bytes], ttl_s: int) -> None:
        """Pin blocks where they are, and remember who acknowledged it."""
        for hit in await self.system.client.lookup(keys, deadline_s=LOOKUP_S):
            try:
                if await self.system.client.admin.pin([hit.key], ttl_s) == ["OK"]:
                    self.pins[hit.key] = hit.node.incarnation
            except ConcertinaError as error:
                self.outcome.notes[f"a pin was refused: {type(error).__name__}"] += 1

    async def check_pins(self) -> None:
        """Every acknowledged pin whose node still lives must still hold; then all are ended."""
        living = {record.incarnation: record for record in self.system.client.nodes()}
        for incarnation in set(self.pins.values()) & living.keys():
            keys = [key for key, holder in self.pins.items() if holder == incarnation]
            pinned = {block.key for block in await listed(self.system, living[incarnation]) if block.pinned}
            for _ in set(keys) - pinned:
                self.outcome.blame("lost_pins", "an acknowledged pin is gone")
        if self.pins:
            await self.system.client.admin.unpin(list(self.pins))

    async def _write_on(self, blocks: int, pause_s: float) -> None:
        while True:
            await self.write(blocks)
            await asyncio.sleep(pause_s)

    async def _read_on(self) -> None:
        at = 0
        while True:
            at += 1
            await self.read(self.prompts[-1 - at % min(5, len(self.prompts))])
            await asyncio.sleep(0.005)

    async def _timed(self, what: str, deadline_s: float, call: Awaitable[Any]) -> Any:
        began = time.monotonic()
        try:
            return await call
        finally:
            late = time.monotonic() - began - deadline_s
            if late > SLACK_S:
                self.outcome.blame("hangs", f"{what} was {late:.1f} s late")


async def listed(system: System, record: Any) -> list[Any]:
    """All blocks of a node, page by page."""
    blocks, after = [], b""
    while True:
        page = await system.client.admin.list(record, after=after)
        blocks += page.blocks
        after = page.next
        if not after:
            return blocks
