"""The frames of Get and Put, built and parsed by hand, so that a payload is copied once (into the arena) or joined once (out of it).

They are ordinary protobuf messages, `GetResponse` and `PutRequest`: a generated stub understands them, and may send its fields in any
order and with fields that this version does not know. A message costs gRPC in Python some 100 µs on each side, whatever its size, so
the frames of small blocks can share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore.errors import InvalidInputError

Buffer = bytes | bytearray | memoryview

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INDEX, _HEADER, _PAYLOAD, _INPUT_TOKENS, _MORE = 1, 2, 3, 4, 5


class PutFrame(NamedTuple):
    """One frame of a Put. `header` is None where the frame has none; both views point into the message."""

    index: int
    header: memoryview | None
    payload: memoryview
    input_tokens: int


def parse_put(message: bytes | memoryview) -> list[PutFrame]:
    """The frames of a `PutRequest`: its own, unless it has neither header nor payload but `more`, then those.

    Raises
    ------
    InvalidInputError
        For bytes that are no such message, or frames nested deeper than one level.
    """
    frames: list[PutFrame] = []
    own = _parse_frame(memoryview(message), frames)
    if own.header is not None or own.payload or not frames:
        frames.insert(0, own)
    return frames


def _parse_frame(view: memoryview, more: list[PutFrame] | None) -> PutFrame:
    """One frame; the nested ones are added to `more`, None where there must not be any."""
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
        if kind == _BYTES:
            part = view[at : at + size]
            if number == _HEADER:
                header = part
            elif number == _PAYLOAD:
                payload = part
            elif number == _MORE:
                if more is None:
                    raise InvalidInputError("frames are nested in a nested frame; put all of them into the message's own `more`")
                more.append(_parse_frame(part, None))
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


def windows(parts: Sequence[Buffer], size: int) -> Iterator[list[Buffer]]:
    """The bytes of `parts` in runs of `size`, the last one shorter; each run as pieces, nothing copied."""
    pieces: list[Buffer] = []
    room = size
    for part in parts:
        view = memoryview(part)
        while len(view):
            pieces.append(view[:room])
            view = view[len(pieces[-1]) :]
            room -= len(pieces[-1])
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def pack(frames: Sequence[bytes]) -> bytes:
    """One `GetResponse`: the first of `frames` (each from `get_frame`), the others as its `more`."""
    if len(frames) == 1:
        return frames[0]
    pieces = [frames[0]]
    for frame in frames[1:]:
        pieces += (b"\x2a", _encode(len(frame)), frame)
    return b"".join(pieces)


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
