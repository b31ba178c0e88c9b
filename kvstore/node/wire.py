"""The frames of Get and Put, built and parsed by hand, so that a payload is copied once (into the arena) or joined once (out of it).

They are ordinary protobuf messages, `GetResponse` and `PutRequest`: a generated stub understands them, and may send its fields in any
order and with fields that this version does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import InvalidInputError

Buffer = bytes | bytearray | memoryview

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INDEX, _HEADER, _PAYLOAD, _INPUT_TOKENS = 1, 2, 3, 4


class PutFrame(NamedTuple):
    """One `PutRequest`. `header` is None where the frame has none; both views point into the frame."""

    index: int
    header: memoryview | None
    payload: memoryview
    input_tokens: int


def parse_put(frame: bytes) -> PutFrame:
    """Parse a `PutRequest`.

    Raises
    ------
    InvalidInputError
        For bytes that are no such message.
    """
    view = memoryview(frame)
    index, header, payload, input_tokens = 0, None, view[:0], 0
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(view, at)
            if number == _INDEX:
                index = value & 0xFFFFFFFF
            elif number == _INPUT_TOKENS:
                input_tokens = value & 0xFFFFFFFF
            continue
        if kind == _BYTES:
            size, at = _varint(view, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise InvalidInputError(f"a Put frame has a field of wire type {kind}, which no PutRequest has")
        if size > end - at or not number:
            raise InvalidInputError("a Put frame ends in the middle of a field; send whole PutRequest messages")
        if kind == _BYTES and number == _HEADER:
            header = view[at : at + size]
        elif kind == _BYTES and number == _PAYLOAD:
            payload = view[at : at + size]
        at += size
    return PutFrame(index, header, payload, input_tokens)


def get_frame(index: int, status: int, header: bytes = b"", payload: Sequence[Buffer] = ()) -> bytes:
    """A `GetResponse`; the pieces of `payload` are joined."""
    size = sum(len(piece) for piece in payload)
    head = b"\x08" + _encode(index) + b"\x10" + _encode(status)
    if header:
        head += b"\x1a" + _encode(len(header)) + header
    if not size:
        return head
    return b"".join((head, b"\x22", _encode(size), *payload))


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            break
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise InvalidInputError("a Put frame has a malformed number; send whole PutRequest messages")
