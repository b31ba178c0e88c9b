"""A node's GPU memory read by another process of the same host, where it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from kvstore.arena import host_identity
from kvstore.checked_copy import address_of
from kvstore.client.buffers import Buffers
from kvstore.client.door import open_door
from kvstore.client.shared import DeviceMemory
from kvstore.errors import CorruptBlockError, TransportError
from kvstore.metadata import NodeRecord
from kvstore.node.status import Status
from tests.client_support import chain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]
MIB = 1 << 20
PROGRAM = "from kvstore.node.node import run; from kvstore.node.config import NodeConfig; run(NodeConfig(arena={}, device='cuda'))"


@contextmanager
def node_process(arena=64 * MIB):
    """A node on the GPU, in a process of its own: that, and its record."""
    torch.zeros(1, device="cuda")  # this process uses the GPU, or it would not read there
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(arena)], stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())
        yield process, NodeRecord(
            ready["id"], ready["incarnation"], ready["address"], device=ready["device"], host=host_identity(), door=ready["door"]
        )
    finally:
        process.kill()
        process.wait(20)
        process.stdout.close()


def read(guest, blocks, buffers):
    """What comes of reading `blocks`, as far as the first that is not there."""
    came = []
    keys, sizes = [b.header.key for b in blocks], [b.header.total_bytes for b in blocks]
    guest.read(keys, sizes, 0, lambda at, header: True, lambda more: came.extend(block for _, block in more), buffers, 20.0)
    return came


@pytest.mark.parametrize(("count", "size"), [(100, 700), (64, 90_000), (20, 2 * MIB)], ids=["small", "blocks", "large"])
def test_blocks_are_copied_out_of_the_nodes_gpu_memory(count, size):
    with node_process() as (_, record):
        blocks, guest = chain(count, size), open_door(record, True, "", 5.0)
        assert isinstance(guest.arena, DeviceMemory)
        statuses = guest.write([(block, 0) for block in blocks], 30.0)
        stored = [block for block, status in zip(blocks, statuses, strict=True) if status == Status.OK]
        assert len(stored) >= min(count, 15)
        assert [b.to_bytes() for b in read(guest, stored, Buffers(256 * MIB))] == [b.to_bytes() for b in stored]
        other = open_door(record, False, "", 5.0)
        assert [b.to_bytes() for b in read(other, stored, Buffers(256 * MIB))] == [b.to_bytes() for b in stored]
        guest.close()
        other.close()


def test_what_is_overwritten_meanwhile_is_a_miss_and_never_wrong():
    with node_process(arena=16 * MIB) as (_, record):
        known = {b.header.key: b.payload for n in range(12) for b in chain(16, 300_000, number=1000 * n)}
        ended, buffers, right = threading.Event(), Buffers(64 * MIB), 0

        def write_on():
            writer = open_door(record, True, "", 5.0)
            for turn in range(120):
                writer.write([(block, 0) for block in chain(16, 300_000, number=1000 * (turn % 12))], 30.0)
            writer.close()
            ended.set()

        thread = threading.Thread(target=write_on)
        thread.start()
        guest, turn = open_door(record, True, "", 5.0), 0
        while not ended.is_set():
            turn += 1
            if not guest.open:
                guest = open_door(record, True, "", 5.0)
            try:
                for block in read(guest, chain(16, 300_000, number=1000 * (turn % 12)), buffers):
                    assert list(block.payload) == list(known[block.header.key][: block.header.present])
                    right += 1
            except CorruptBlockError as error:
                pytest.fail(f"bytes that were another block's were taken for damaged: {error}")
        thread.join(30)
        assert right > 0


def test_a_node_that_is_killed_takes_no_reader_along():
    with node_process() as (process, record):
        blocks, guest = chain(12, MIB), open_door(record, True, "", 5.0)
        guest.write([(block, 0) for block in blocks], 30.0)
        assert len(read(guest, blocks, Buffers(64 * MIB))) == 12
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        with pytest.raises((OSError, TransportError)):
            read(guest, blocks, Buffers(64 * MIB))
        target = Buffers(0).take(MIB)
        guest.arena.copy(np.array([(address_of(target), 0, MIB, 0)], np.uint64))  # as if the plan had come just before
    assert int(torch.arange(10, device="cuda").sum()) == 45
