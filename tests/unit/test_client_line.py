"""Messages of the door as a client reads them."""

from __future__ import annotations

import socket
import time

import pytest

from kvstore import door
from kvstore.client.line import Line
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
