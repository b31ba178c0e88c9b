"""Messages of the door as a client reads them."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time

import pytest
import uvloop

from kvstore import door
from kvstore.client.line import DIRECT_BYTES, RECEIVED_BYTES, Line
from kvstore.door import Kind
from kvstore.errors import TransportError


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    line = Line(ours)
    line.deadline = time.monotonic() + 10
    with ours, theirs:
        yield line, theirs


def test_a_message_is_there_when_its_last_byte_is(ends):
    line, node = ends
    said = door.message(Kind.PLANNED, bytes(range(100)))
    for at in range(len(said)):
        assert not line.has_message()
        node.sendall(said[at : at + 1])
    assert line.has_message()
    node.sendall(said)
    for more in (False, False):  # the second came with the first: a look at the connection does not tell
        assert bytes(line.receive(Kind.PLANNED)) == bytes(range(100))
        assert line.has_message() is more


def test_a_connection_that_has_ended_has_no_message(ends):
    line, node = ends
    node.close()
    assert not line.has_message()


def test_what_is_no_message_is_refused_before_it_is_waited_for(ends):
    line, node = ends
    node.sendall(b"\xff" * 5)
    with pytest.raises(TransportError):
        line.has_message()


@pytest.mark.parametrize("size", [1, DIRECT_BYTES - 1, DIRECT_BYTES, 100_000, RECEIVED_BYTES, RECEIVED_BYTES + 1])
def test_a_payload_comes_where_it_belongs_and_what_is_behind_it_is_next(ends, size):
    line, node = ends
    line.deadline = time.monotonic() + 30
    payloads = [random.Random(number).randbytes(size) for number in range(3)]
    sent = b"".join(door.message(Kind.PLANNED, bytes([number] * 700)) + payload for number, payload in enumerate(payloads))
    sending = threading.Thread(target=node.sendall, args=(sent,))
    sending.start()
    for number, payload in enumerate(payloads):
        assert bytes(line.receive(Kind.PLANNED)) == bytes([number] * 700)
        buffer = memoryview(bytearray(size))
        line.fill(buffer)
        assert buffer == payload
    sending.join()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_connection_that_was_waited_for_in_a_loop_blocks_as_before(ends, new_loop):
    line, node = ends
    said = door.message(Kind.PLANNED, b"there")

    async def wait() -> list[bool]:
        waits = asyncio.create_task(line.readable())
        await asyncio.sleep(0.02)
        assert not waits.done()
        node.sendall(said)
        line_says = [await waits, await line.readable()]
        line.receive(Kind.PLANNED)
        line.deadline = time.monotonic() + 0.05
        node.sendall(said[:-1])  # no whole message: to wait for the rest is for a thread
        return [*line_says, await line.readable(), await line.readable()]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(wait()) == [True, True, False, False]
    line.deadline = time.monotonic() + 10
    later = threading.Timer(0.1, node.sendall, (said[-1:],))
    later.start()
    assert bytes(line.receive(Kind.PLANNED)) == b"there"
    later.join()
