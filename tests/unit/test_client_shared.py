"""A node's memory as readers see it: copies out of a GPU's, in as few and as large pieces as can be; marks that have changed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from crc32c import crc32c

from kvstore.checked_copy import address_of
from kvstore.client import shared
from kvstore.client.shared import DeviceCopies, SharedMemory
from kvstore.errors import CorruptBlockError


class Copies(DeviceCopies):
    """Those of a GPU's memory, from the host's: everything is there at once."""

    def _send(self, ranges):
        self.ranges = ranges
        there = SimpleNamespace(synchronize=lambda: None)
        return torch.cat([self._pages[start : start + size] for start, size in ranges] or [self._pages[:0]]), [there] * len(ranges)


@pytest.mark.parametrize("piece_bytes", [1, 700, 1 << 20])
def test_rows_come_as_they_are_and_neighbours_in_one_range(piece_bytes, monkeypatch):
    monkeypatch.setattr(shared, "PIECE_BYTES", piece_bytes)
    pages = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8))
    rows = [(0, 300, False), (300, 50, True), (4096, 500, False), (90_000, 7, False), (95_000, 3, True), (10, 5000, False)]
    target = np.zeros(sum(size for _, size, _ in rows), np.uint8)
    copies, at = Copies(pages), address_of(target)
    for start, size, goes_on in rows:
        copies.add(at, start, size, goes_on)
        at += size
    crcs, at, crc = copies.make(), 0, 0
    for (start, size, goes_on), found in zip(rows, crcs, strict=True):
        want = pages[start : start + size].numpy().tobytes()
        assert target[at : at + size].tobytes() == want
        crc = crc32c(want, crc if goes_on else 0)
        assert found == crc
        at += size
    assert len(crcs) == len(copies) == len(rows)
    assert copies.ranges == [(0, 4596), (90_000, 7), (95_000, 3), (10, 5000)]


def test_nothing_to_copy_is_no_copy():
    assert list(Copies(torch.empty(10, dtype=torch.uint8)).make()) == []


def test_marks_say_how_many_blocks_are_as_they_were():
    memory = SharedMemory(np.array([7, 8, 9, 10], np.uint64).view(np.uint8))
    for marks, sound in (([], 0), ([(0, 7), (24, 10), (8, 8)], 3), ([(0, 7), (16, 8), (8, 8)], 1)):
        assert memory.sound(np.array(marks, np.uint64).reshape(-1, 2)) == sound
    with pytest.raises(CorruptBlockError):
        memory.sound(np.array([(0, 7), (32, 1)], np.uint64))
