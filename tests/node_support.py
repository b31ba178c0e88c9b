"""Real encoded blocks and frames for the node's tests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo, Provenance
from kvstore.identity import NO_PARENT, digest
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

NAMESPACE = digest(b"namespace")


def key_of(number: int) -> bytes:
    """The key of test block `number`."""
    return digest(b"test block", str(number).encode())


def block(
    number: int = 0,
    sizes: Sequence[int] = (3000, 5000),
    parent: bytes = NO_PARENT,
    *,
    depth: int = 0,
    error: float = 0.1,
    provenance: Provenance | None = None,
    namespace: bytes = NAMESPACE,
    codec: int = 1,
    salt: int = 0,
) -> EncodedBlock:
    """A block of random payload with one layer of each of `sizes`; its error halves with each layer from `error`."""
    payload = [random.Random(f"{number} {salt} {i}").randbytes(size) for i, size in enumerate(sizes)]
    rows = tuple(LayerInfo(0, 0, Distortion(error / 2**i, error / 2**i)) for i in range(len(sizes)))
    header = BlockHeader(codec, 2, 30, 3, 64, 64 * depth, 64, rows, len(sizes))
    return EncodedBlock.build(header, payload).with_identity(key_of(number), namespace, parent, provenance)


def chain(count: int, sizes: Sequence[int] = (3000, 5000), first: int = 0) -> list[EncodedBlock]:
    """`count` blocks, each the parent of the next."""
    blocks: list[EncodedBlock] = []
    for depth in range(count):
        parent = blocks[-1].header.key if blocks else NO_PARENT
        blocks.append(block(first + depth, sizes, parent, depth=depth))
    return blocks


def frames(blocks: Sequence[EncodedBlock], step: int = 1 << 20) -> Iterator[pb.PutRequest]:
    """The Put stream of `blocks`, in frames of at most `step` payload bytes."""
    for index, one in enumerate(blocks):
        data, header = b"".join(one.payload), one.header.to_bytes()
        for at in range(0, len(data), step):
            yield pb.PutRequest(index=index, header=header, payload=data[at : at + step])
            header = b""
