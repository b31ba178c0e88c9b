"""The checker is checked: bugs that we plant must be found within a few seeds, each by the promise that it breaks."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest

from kvstore.block import BlockHeader, EncodedBlock
from kvstore.client.assemble import Assembly
from kvstore.client.client import KvClient
from kvstore.client.prefix import Fetch
from kvstore.errors import CorruptBlockError
from kvstore.metadata import InprocMetadata
from kvstore.node.copier import BlockWriter
from kvstore.node.engine import NodeEngine
from kvstore.node.holds import Holds
from tests.sim.world import simulate

SEEDS = range(1, 61)


def verify_nothing(header: BlockHeader, payload) -> EncodedBlock:
    """Cut a payload into layers without looking at a CRC."""
    view = memoryview(payload).cast("B")
    if len(view) != header.payload_bytes:
        raise CorruptBlockError("length")
    parts, at = [], 0
    for row in header.rows[: header.present]:
        parts.append(view[at : at + row.size_bytes])
        at += row.size_bytes
    return EncodedBlock(header, tuple(parts))


def end_parts_unverified(self: Assembly) -> None:
    while len(self._parts) < len(self._sizes) and self._at - self._start == self._sizes[len(self._parts)]:
        self._parts.append(self._buffer[self._start : self._at])
        self._start, self._crc = self._at, 0


def write_unverified(self: BlockWriter, data: memoryview) -> None:
    self.left -= len(data)
    while len(data):
        row = self._header.rows[self._layer]
        piece = data[: row.size_bytes - self._offset]
        self._arena.write(self._layers[self._layer], self._offset, piece)
        self._offset += len(piece)
        data = data[len(piece) :]
        if self._offset == row.size_bytes:
            self._layer, self._offset = self._layer + 1, 0


def forget_leases(self: Holds, entries, lease_s: float) -> int:
    return 0


def end_pins_early(self: Holds) -> None:
    self._give_all(self.leases.expire(self._clock.now()))
    self._give_all(self.pins.expire(math.inf))


def keep_pages(self: NodeEngine, reservation) -> None:
    self._end_writing(reservation)


def keep_the_dead(self: InprocMetadata, table: dict) -> list:
    return [record for _, record in table.values()]


def take_anything(self: Fetch, position: int, header: BlockHeader) -> bool:
    return True


fetch_in_time = KvClient.fetch


async def fetch_late(self: KvClient, hits, *, deadline_s: float, **options):
    return await fetch_in_time(self, hits, deadline_s=deadline_s + 1.0, **options)


#: What is planted: where, what takes its place, and the words of the violation that must follow.
BUGS = {
    "a client checks no CRC": (
        [(EncodedBlock, "verify", verify_nothing), (Assembly, "_end_parts", end_parts_unverified)],
        "bytes that nobody wrote",
    ),
    "a node checks no CRC": ([(BlockWriter, "write", write_unverified)], "holds bytes that nobody wrote"),
    "pages are used again under a reader": (
        [(Holds, "lease", forget_leases), (NodeEngine, "intact", lambda self, found: True)],
        "looked corrupt, though no bit was changed",
    ),
    "pins end early": ([(Holds, "expire", end_pins_early)], "lost a block that it had pinned"),
    "an aborted put keeps its pages": ([(NodeEngine, "abort", keep_pages)], "the account of"),
    "dead incarnations are served from": ([(InprocMetadata, "_living", keep_the_dead)], "has been dead for"),
    "the namespace is not checked": ([(Fetch, "check", take_anything)], "another namespace was served"),
    "the bound on distortion is not checked": ([(Fetch, "check", take_anything)], "less exact than asked for"),
    "a fetch overruns its deadline": ([(KvClient, "fetch", fetch_late)], "after its deadline"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str) -> None:
    patches, words = BUGS[name]
    for seed in SEEDS:
        found = violations(seed, patches)
        if any(words in violation for violation in found):
            return
    pytest.fail(f"{len(SEEDS)} seeds did not find it")


def violations(seed: int, patches: list) -> list[str]:
    """What `seed` finds with the bugs in place."""
    if not patches:
        return simulate(seed).violations
    (owner, name, planted), *rest = patches
    with patch.object(owner, name, planted):
        return violations(seed, rest)
