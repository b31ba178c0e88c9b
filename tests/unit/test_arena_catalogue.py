"""The table in shared memory that says where blocks lie."""

from __future__ import annotations

import mmap
import os
import random

import numpy as np
import pytest

from kvstore.arena.catalogue import MAX_ROWS, ROW_BYTES, WAYS, Catalogue, create_catalogue

_rng = random.Random(4)


def keys(count: int) -> list[bytes]:
    return [_rng.randbytes(32) for _ in range(count)]


def empty(rows: int = 1024) -> Catalogue:
    return Catalogue(np.zeros(rows * (ROW_BYTES + 8), np.uint8))


def test_what_was_noted_is_found_in_the_order_of_the_keys():
    catalogue, some = empty(), keys(300)
    for number, key in enumerate(some):
        catalogue.note(key, b"%d." % number)
    assert catalogue.find(some[7:10]) == b"7.8.9."
    assert catalogue.find(some[9:6:-1]) == b"9.8.7."
    catalogue.note(some[8], b"elsewhere.")
    assert catalogue.find(some[7:10]) == b"7.elsewhere.9."


def test_unless_all_are_there_nothing_is_found():
    catalogue, (known, unknown) = empty(), keys(2)
    catalogue.note(known, b"here")
    assert catalogue.find([known]) == b"here"
    assert catalogue.find([known, unknown]) is None and catalogue.find([unknown]) is None


def test_a_full_bucket_loses_others_and_keeps_the_newest():
    catalogue, some = empty(), [bytes((*bytes(7), number, *bytes(24))) for number in range(1, 3 * WAYS)]  # tags are multiples of 2^56
    for number, key in enumerate(some):
        catalogue.note(key, b"%02d" % number)
        assert catalogue.find([key]) == b"%02d" % number
    assert sum(catalogue.find([key]) is not None for key in some) == WAYS


@pytest.mark.parametrize(("size", "fits"), [(ROW_BYTES - 2, True), (ROW_BYTES - 1, False), (0, True)])
def test_entries_longer_than_a_row_are_left_out(size, fits):
    catalogue, (key,) = empty(), keys(1)
    catalogue.note(key, bytes(size))
    assert catalogue.find([key]) == (bytes(size) if fits else None)


def test_a_length_that_cannot_be_is_cut_to_the_row():
    memory, (key,) = np.zeros(1024 * (ROW_BYTES + 8), np.uint8), keys(1)
    catalogue = Catalogue(memory)
    catalogue.note(key, b"here")
    memory[1024 * 8 :] = 255
    assert catalogue.find([key]) == b"\xff" * (ROW_BYTES - 2)


@pytest.mark.parametrize("arena_bytes", [1, 64 << 20, 1 << 40])
def test_a_catalogue_is_as_large_as_its_arena_needs_and_others_may_only_read_it(arena_bytes):
    descriptor, catalogue = create_catalogue(arena_bytes)
    (key,) = keys(1)
    try:
        size_bytes = os.fstat(descriptor).st_size
        assert size_bytes <= max(arena_bytes // 30, 1 << 20) and size_bytes <= MAX_ROWS * (ROW_BYTES + 8)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_WRITE)
        theirs = Catalogue(np.frombuffer(mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8))
        catalogue.note(key, b"here")
        assert theirs.find([key]) == b"here"
    finally:
        os.close(descriptor)
