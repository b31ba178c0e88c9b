"""Copies with their CRC-32C: the same bytes and sums as a copy and the library, of any length, at any place."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c

from kvstore import checked_copy
from kvstore.checked_copy import Copies, address_of, copy_checked


@pytest.fixture(params=["native", "pieces"])
def way(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(checked_copy, "_routine", lambda: checked_copy._in_pieces)
    elif checked_copy._routine() is checked_copy._in_pieces:
        assert not {"pclmulqdq", "sse4_2"} <= set(Path("/proc/cpuinfo").read_text().split())
        pytest.skip("this processor lacks the instructions")


def check(data: bytes, target: np.ndarray, at: int, crc: int) -> None:
    target[:] = 0xA5
    assert copy_checked(target[at:], data, crc) == crc32c(data, crc)
    assert target[at : at + len(data)].tobytes() == data
    assert (target[:at] == 0xA5).all() and (target[at + len(data) :] == 0xA5).all()


@pytest.mark.parametrize("size", [*range(200), 255, 256, 4095, 4096, 4097, 300_001, 1 << 20])
def test_every_length(way, size):
    check(random.Random(size).randbytes(size), np.empty(size + 32, np.uint8), 7, size * 2654435761 % 2**32)


def test_any_place_and_any_sum_before(way):
    rng = random.Random(0)
    memory, target = np.frombuffer(rng.randbytes(1 << 16), np.uint8), np.empty(1 << 16, np.uint8)
    for _ in range(300):
        start, at = rng.randrange(1 << 15), rng.randrange(1 << 15)
        check(memory[start : start + rng.randrange(1 << 15)].tobytes(), target, at, rng.getrandbits(32))


def test_pieces_continue_each_other(way):
    data, target, at, crc = random.Random(1).randbytes(100_000), memoryview(bytearray(100_000)), 0, 0
    while at < len(data):
        piece = memoryview(data)[at : at + 777]
        crc = copy_checked(target[at:], piece, crc)
        at += len(piece)
    assert crc == crc32c(data) and target == data


def test_many_at_once_each_with_a_sum_of_its_own_or_of_those_before(way):
    rng = random.Random(2)
    memory, target, copies, wanted = rng.randbytes(1 << 20), np.zeros(1 << 20, np.uint8), Copies(), []
    at, crc = 0, 0
    while at < len(memory) - 5000:
        size, start = rng.choice((1, 7, 64, 65, rng.randrange(1, 5000))), rng.randrange(len(memory) - 5000)
        goes_on = at > 0 and rng.random() < 0.5
        copies.add(address_of(target) + at, address_of(memory) + start, size, goes_on)
        crc = crc32c(memory[start : start + size], crc if goes_on else 0)
        wanted.append((at, memory[start : start + size], crc))
        at += size
    assert list(copies.make()) == [crc for _, _, crc in wanted]
    assert all(target[at : at + len(data)].tobytes() == data for at, data, _ in wanted) and not target[at:].any()
    assert list(Copies().make()) == []


def test_what_does_not_fit_or_cannot_be_written_is_refused(way):
    with pytest.raises(ValueError, match="5 bytes cannot be copied to 4"):
        copy_checked(memoryview(bytearray(4)), b"12345")
    with pytest.raises(ValueError, match="read-only"):
        copy_checked(memoryview(b"1234"), b"1234")
    assert copy_checked(memoryview(b""), b"", 17) == 17
