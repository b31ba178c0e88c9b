"""The two messages of the data plane, read and written by hand.

`GetResponse` and `PutRequest` carry megabytes; a protobuf runtime would copy them once more each way. Both have the same three
fields, so this file knows their tags and nothing else (``kvstore.proto``; a test holds it against the generated code).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvstore.block import EncodedBlock
from kvstore.errors import TransportError

#: Payload bytes of one frame.
FRAME_BYTES = 4 << 20

_INDEX, _STATUS, _GET_HEADER, _GET_PAYLOAD = 0x08, 0x10, 0x1A, 0x22
_PUT_HEADER, _PUT_PAYLOAD, _PUT_INPUT_TOKENS = b"\x12", b"\x1a", b"\x20"
_FIXED_WIDTH = {1: 8, 5: 4}
_EMPTY = memoryview(b"")


class GetFrame(NamedTuple):
    """One `GetResponse`; `header` and `payload` look into the frame's own bytes."""

    index: int
    status: int
    header: memoryview
    payload: memoryview


def parse_get_frame(frame: bytes) -> GetFrame:
    """Read one serialized `GetResponse`. Raises TransportError for bytes that are none."""
    view, at, end = memoryview(frame), 0, len(frame)
    index = status = 0
    header = payload = _EMPTY
    try:
        while at < end:
            tag, at = _varint(view, at)
            kind = tag & 7
            if kind in _FIXED_WIDTH:
                at += _FIXED_WIDTH[kind]
                continue
            value, at = _varint(view, at)
            if kind == 2:
                part, at = view[at : at + value], at + value
                if tag == _GET_HEADER:
                    header = part
                elif tag == _GET_PAYLOAD:
                    payload = part
            elif kind != 0:
                raise TransportError(f"a Get frame has wire type {kind}")
            elif tag == _INDEX:
                index = value
            elif tag == _STATUS:
                status = value
    except IndexError:
        raise TransportError("a Get frame is cut short") from None
    if at != end:
        raise TransportError("a Get frame is cut short")
    return GetFrame(index, status, header, payload)


def put_frames(index: int, block: EncodedBlock, input_tokens: int = 0) -> Iterator[bytes]:
    """`block` as serialized `PutRequest` messages: the header with the first of the payload, then the rest.

    Parameters
    ----------
    index : int
        Number of the block within its Put call.
    input_tokens : int
        Length of the prompt it comes from; 0 if not known.
    """
    header = block.header.to_bytes()
    tail = _PUT_INPUT_TOKENS + _encode_varint(input_tokens) if input_tokens else b""
    start = b"".join((bytes((_INDEX,)), _encode_varint(index)))
    head = b"".join((start, _PUT_HEADER, _encode_varint(len(header)), header, tail))
    for size, parts in _cut(block):
        yield b"".join((head, _PUT_PAYLOAD, _encode_varint(size), *parts))
        head = start


def _cut(block: EncodedBlock) -> Iterator[tuple[int, list[memoryview]]]:
    """The payload in runs of at most FRAME_BYTES; at least one run, so that an empty payload has its frame too."""
    size, parts = 0, []
    for layer in block.payload:
        view = memoryview(layer).cast("B")
        for at in range(0, len(view), FRAME_BYTES):
            piece = view[at : at + FRAME_BYTES]
            if size + len(piece) > FRAME_BYTES:
                yield size, parts
                size, parts = 0, []
            size += len(piece)
            parts.append(piece)
    yield size, parts


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """The number at `at` and the position after it. Raises IndexError at the end, TransportError for more than 64 bits."""
    value = view[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = view[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise TransportError("a Get frame has a number of more than 64 bits")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
