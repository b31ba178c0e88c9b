"""A profile's file as ordinary blocks of the store, and back.

The store keeps nothing but encoded blocks, which certify themselves; so a profile travels as a chain of blocks with a codec number that
no codec of K and V has. Namespace and keys follow from the digest of the file, so nobody's blocks can be taken for another's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.codecs import PROFILE_WIRE_ID
from kvstore.errors import CorruptBlockError
from kvstore.identity import NO_PARENT, block_keys, digest

#: Payload of a block: small enough that a node never has to clear much at once.
CHUNK_BYTES = 8 << 20
#: Larger files are neither shared nor fetched.
MAX_BYTES = 1 << 30
#: A layer without error, of the smallest shape that a header may state: it stands for no K and V.
_ROW = LayerInfo(0, 0, Distortion(0.0, 0.0))


def namespace_of(content: bytes) -> bytes:
    """Namespace of the file with the digest `content`."""
    return digest(b"profile", struct.pack("<I", CHUNK_BYTES), content)


def keys_of(content: bytes, size_bytes: int) -> list[bytes]:
    """Keys of the chunks of a file of `size_bytes` with the digest `content`, each chained to the one before."""
    return block_keys(namespace_of(content), range(-(-size_bytes // CHUNK_BYTES)), 1)


def split(data: bytes) -> list[EncodedBlock]:
    """The chunks of a file; they refer to `data`."""
    content = digest(data)
    namespace, parent, view = namespace_of(content), NO_PARENT, memoryview(data)
    blocks = []
    for number, key in enumerate(keys_of(content, len(data))):
        payload = view[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        header = BlockHeader(PROFILE_WIRE_ID, 0, 1, 1, 1, start=number, tokens=1, rows=(_ROW,), present=1)
        blocks.append(EncodedBlock.build(header, (payload,)).with_identity(key, namespace, parent))
        parent = key
    return blocks


def join(blocks: Sequence[EncodedBlock], content: bytes) -> bytes:
    """The file again. Raises CorruptBlockError when it is not the one with the digest `content`."""
    data = b"".join(part for block in blocks for part in block.payload)
    if digest(data) != content:
        raise CorruptBlockError("the chunks of the profile are not those of the file that was named")
    return data
