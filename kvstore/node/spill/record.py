"""A spilled block as bytes: who owns it, then the block itself.

Layout, little-endian::

    magic "KVSP" | version u16 | owner bytes u16 | CRC-32C of the owner u32 | owner, UTF-8 | the block (`kvstore.block`)

The block certifies itself; of the owner the CRC does. Both are checked whenever a record is read.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c

from kvstore.block import MAX_HEADER_BYTES, BlockHeader, EncodedBlock
from kvstore.errors import CorruptBlockError

from .base import Buffer

MAGIC, VERSION = b"KVSP", 1
MAX_OWNER_BYTES = 256
_PREFIX = struct.Struct("<4sHHI")
#: So many bytes at the start of a record hold its owner and the block's header.
HEAD_BYTES = _PREFIX.size + MAX_OWNER_BYTES + MAX_HEADER_BYTES


class Head(NamedTuple):
    """What the start of a record says. `size_bytes` is the whole record's."""

    owner: str
    header: BlockHeader
    size_bytes: int


def prefix(owner: str) -> bytes:
    """The start of a record, up to the block."""
    name = owner.encode()
    return _PREFIX.pack(MAGIC, VERSION, len(name), crc32c(name)) + name


def read_head(data: Buffer) -> Head:
    """Parse and verify the start of a record. Raises CorruptBlockError for anything else."""
    owner, at = _owner(data)
    header = BlockHeader.from_bytes(memoryview(data)[at:])
    return Head(owner, header, at + header.total_bytes)


def read(data: Buffer) -> tuple[str, EncodedBlock]:
    """Parse and verify a whole record: owner and block, which refers to `data`. Raises CorruptBlockError for anything else."""
    owner, at = _owner(data)
    return owner, EncodedBlock.from_bytes(memoryview(data)[at:])


def _owner(data: Buffer) -> tuple[str, int]:
    """The owner, and where the block begins."""
    if len(data) < _PREFIX.size:
        raise CorruptBlockError(f"{len(data)} bytes are too few for a spilled block")
    magic, version, size, crc = _PREFIX.unpack_from(data)
    name = bytes(data[_PREFIX.size : _PREFIX.size + size])
    if magic != MAGIC or version != VERSION or size > MAX_OWNER_BYTES or crc32c(name) != crc:
        raise CorruptBlockError("these bytes are no spilled block, or its owner's CRC-32C does not match")
    try:
        return name.decode(), _PREFIX.size + size
    except UnicodeDecodeError:
        raise CorruptBlockError("a spilled block's owner is no text") from None
