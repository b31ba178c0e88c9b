"""The two messages of the data plane, read and written by hand.

`GetResponse` and `PutRequest` carry megabytes; a protobuf runtime would copy them once more each way. Both have the same few fields,
so this file knows their tags and nothing else (``kvstore.proto``; a test holds it against the generated code). A message costs gRPC in
Python some 100 µs on each side whatever its size, so the frames of small blocks share one (field ``more``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvstore.block import EncodedBlock
from kvstore.errors import TransportError

Buffer = bytes | memoryview

#: Payload bytes of one frame.
FRAME_BYTES = 2 << 20
#: Frames are joined until their message has so many bytes.
PACK_BYTES = 2 << 20
#: Frames that one received message may hold; more than a megabyte of the smallest blocks.
MAX_PACKED = 1 << 16

_INDEX, _STATUS, _GET_HEADER, _GET_PAYLOAD, _MORE = 0x08, 0x10, 0x1A, 0x22, 0x2A
_PUT_HEADER, _PUT_PAYLOAD, _PUT_INPUT_TOKENS, _PUT_MORE = b"\x12", b"\x1a", b"\x20", b"\x2a"
_FIXED_WIDTH = {1: 8, 5: 4}
_EMPTY = memoryview(b"")


class GetFrame(NamedTuple):
    """One frame of a Get; `header` and `payload` look into the message's own bytes."""

    index: int
    status: int
    header: memoryview
    payload: memoryview


def parse_get(message: bytes) -> list[GetFrame]:
    """The frames of one serialized `GetResponse`: its own, then those of `more`. Raises TransportError for bytes that are none."""
    more: list[memoryview] = []
    frames = [_parse_frame(memoryview(message), more)]
    if len(more) > MAX_PACKED:
        raise TransportError(f"a Get message has {len(more)} frames")
    frames += [_parse_frame(part, None) for part in more]
    return frames


def _parse_frame(view: memoryview, more: list[memoryview] | None) -> GetFrame:
    """One frame; the bytes of nested ones are added to `more`, None where there must not be any."""
    at, end = 0, len(view)
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
                elif tag == _MORE:
                    if more is None:
                        raise TransportError("a Get frame is nested in a nested one")
                    more.append(part)
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


def put_messages(blocks: Iterable[tuple[EncodedBlock, int]]) -> Iterator[bytes]:
    """Blocks as serialized `PutRequest` messages, numbered from 0; each payload byte is copied once.

    Parameters
    ----------
    blocks : iterable of (EncodedBlock, int)
        With the length of the prompt that each comes from, 0 if not known.
    """
    waiting: list[Buffer] = []
    size = 0
    for index, (block, input_tokens) in enumerate(blocks):
        for frame_bytes, pieces in _put_frames(index, block, input_tokens):
            if waiting and size + frame_bytes > PACK_BYTES:
                yield b"".join(waiting)
                waiting, size = [], 0
            if waiting:
                waiting += (_PUT_MORE, _encode_varint(frame_bytes))
            waiting += pieces
            size += frame_bytes
    if waiting:
        yield b"".join(waiting)


def _put_frames(index: int, block: EncodedBlock, input_tokens: int) -> Iterator[tuple[int, list[Buffer]]]:
    """The frames of one block, as pieces to join and their size: the header with the first of the payload, then the rest."""
    header = block.header.to_bytes()
    tail = _PUT_INPUT_TOKENS + _encode_varint(input_tokens) if input_tokens else b""
    start = bytes((_INDEX,)) + _encode_varint(index)
    head = b"".join((start, _PUT_HEADER, _encode_varint(len(header)), header, tail))
    for size, parts in _cut(block):
        head += _PUT_PAYLOAD + _encode_varint(size)
        yield len(head) + size, [head, *parts]
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
