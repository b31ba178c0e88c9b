"""Buffers of a fetch are used again, but never while anybody can still see them."""

from __future__ import annotations

import numpy as np

from kvstore.checked_copy import address_of
from kvstore.client.buffers import SHARED_BYTES, Buffers, Carver

MIB = 1 << 20


def test_a_buffer_comes_back_when_its_last_view_is_gone():
    buffers = Buffers(keep_bytes=8 * MIB)
    whole = buffers.take(2 * MIB)
    part = whole[100:200]
    del whole
    assert not buffers.kept_bytes
    view = np.frombuffer(part, np.uint8)
    del part
    assert not buffers.kept_bytes
    del view
    assert buffers.kept_bytes == 2 * MIB
    again = buffers.take(2 * MIB - 1000)
    assert len(again) == 2 * MIB - 1000 and not buffers.kept_bytes


def test_no_more_is_kept_than_was_said():
    buffers = Buffers(keep_bytes=3 * MIB)
    held = [buffers.take(2 * MIB) for _ in range(3)]
    del held
    assert buffers.kept_bytes == 2 * MIB
    buffers.trim()
    assert not buffers.kept_bytes


def test_small_blocks_share_a_buffer_and_do_not_overlap():
    buffers = Buffers(keep_bytes=SHARED_BYTES)
    carver = Carver(buffers)
    parts, addresses = zip(*(carver.take(size) for size in (1000, 1, 500_000, 4096, SHARED_BYTES)), strict=True)
    assert addresses == tuple(map(address_of, parts))
    for number, part in enumerate(parts):
        part[:] = bytes([number]) * len(part)
    assert all(set(part) == {number} for number, part in enumerate(parts))
    del carver, part
    assert not buffers.kept_bytes
    del parts
    assert buffers.kept_bytes == SHARED_BYTES
