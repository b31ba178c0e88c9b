"""The arena's memory: bytes come back as they went in, over any extents; impossible sizes are refused by name."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.arena import Extent, available_memory, create, host_identity
from kvstore.errors import ConfigError

PAGE = 4096


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 2**32), st.data())
def test_any_range_of_scattered_extents_reads_back(seed: int, data: st.DataObject) -> None:
    rng = random.Random(seed)
    arena = create(64 * PAGE, page_bytes=PAGE)
    starts = rng.sample(range(0, 64, 4), 4)
    extents = [Extent(start, rng.randint(1, 4)) for start in starts]
    size = sum(e.count for e in extents) * PAGE
    content = bytearray(rng.randbytes(size))
    arena.write(extents, 0, content)
    offset = data.draw(st.integers(0, size))
    piece = rng.randbytes(data.draw(st.integers(0, size - offset)))
    arena.write(extents, offset, piece)
    content[offset : offset + len(piece)] = piece
    assert b"".join(arena.read(extents, 0, size)) == content
    assert b"".join(arena.read(extents, offset, len(piece))) == piece
    arena.close()


def test_bytes_beyond_the_extents_are_refused() -> None:
    arena = create(4 * PAGE, page_bytes=PAGE)
    with pytest.raises(ValueError, match="beyond"):
        arena.write([Extent(0, 1)], 0, bytes(PAGE + 1))
    with pytest.raises(ValueError, match="beyond"):
        arena.read([Extent(0, 1)], PAGE - 1, 2)


def test_one_extent_is_read_without_a_copy_and_cannot_be_written() -> None:
    arena = create(4 * PAGE, page_bytes=PAGE)
    (view,) = arena.read([Extent(1, 2)], 0, 2 * PAGE)
    arena.write([Extent(1, 1)], 0, b"later")
    assert bytes(view[:5]) == b"later"
    assert view.readonly


def test_tensor_shares_the_memory() -> None:
    arena = create(4 * PAGE, page_bytes=PAGE)
    arena.write([Extent(0, 1)], 3, b"\x07\x08")
    assert arena.tensor.dtype == torch.uint8
    assert arena.tensor.shape == (4 * PAGE,)
    assert arena.tensor[3:5].tolist() == [7, 8]


def test_memory_is_private_shared_and_nameless() -> None:
    arena = create(4 * PAGE, page_bytes=PAGE)
    arena.write([Extent(2, 1)], 0, b"seen from outside")
    status = os.fstat(arena.fd)
    assert status.st_mode & 0o777 == 0o600
    with open(f"/proc/{os.getpid()}/fd/{arena.fd}", "rb") as other:
        other.seek(2 * PAGE)
        assert other.read(17) == b"seen from outside"
    assert "deleted" in os.readlink(f"/proc/self/fd/{arena.fd}"), "no file is left to clean up"


@pytest.mark.parametrize(
    ("size", "device", "word"),
    [
        (0, "cpu", "--arena"),
        (PAGE - 1, "cpu", "--arena"),
        (1 << 60, "cpu", "--arena"),
        (1 << 20, "tpu", "cpu, cuda"),
        (1 << 20, "cuda:99", "GPU"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_mend(size: int, device: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        create(size, device, PAGE)


def test_the_machine_is_known() -> None:
    assert available_memory() > 0
    assert host_identity() == host_identity()
    assert ":" in host_identity()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_arena_reads_back_what_was_written() -> None:
    arena = create(16 << 20, "cuda", PAGE)
    extents = [Extent(3000, 1000), Extent(10, 500)]
    content = random.Random(0).randbytes(1500 * PAGE - 7)
    arena.write(extents, 5, content)
    assert b"".join(arena.read(extents, 5, len(content))) == content
    assert arena.tensor.device.type == "cuda"
