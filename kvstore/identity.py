"""Who a block is: namespaces and chained block keys (DESIGN §3).

``namespace = H(tagged, length-prefixed fields)`` and ``key[i] = H(namespace, key[i-1], tokens of block i)``, H = BLAKE2b-256.
Digests are never cut short, and no two different field sets can collide by concatenation.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from .errors import InvalidInputError

DIGEST_BYTES = 32
#: Parent of a sequence's first block.
NO_PARENT = bytes(DIGEST_BYTES)
FORMAT_VERSION = 1


def digest(*parts: bytes) -> bytes:
    """BLAKE2b-256 of the parts, each preceded by its length as little-endian uint64."""
    h = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        h.update(struct.pack("<Q", len(part)))
        h.update(part)
    return h.digest()


@dataclass(frozen=True, slots=True)
class NamespaceFields:
    """All that must match, besides the tokens, for a block to be reusable.

    Parameters
    ----------
    model : str
        Fingerprint of the model: digest of its config and of the weight files' headers and sizes, or one given by the user.
    dtype : str
        Element type of the cached K and V, such as ``bfloat16``.
    layers, kv_heads, head_dim : int
        Shape of the cache.
    rope : str
        Canonical text of the RoPE parameters (``KVLayout.rope.canonical()``).
    adapter : str
        LoRA adapter id, empty for none.
    tensor_parallel_rank, tensor_parallel_size : int
        Which slice of the heads this is.
    block_tokens : int
        Tokens a block.
    tenant : str
        Owner, from the caller's credential.
    """

    model: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    adapter: str = ""
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    block_tokens: int = 64
    tenant: str = "default"


def namespace(values: NamespaceFields | Mapping[str, object]) -> bytes:
    """Digest of the namespace, 32 bytes.

    Every field goes in as *name, type tag, value*, each length-prefixed, so that a LoRA id can never be taken for a tenant, nor
    ``a|bc`` for ``ab|c``.

    Raises
    ------
    InvalidInputError
        For a field that is not of type str or int.
    """
    if isinstance(values, NamespaceFields):
        values = {f.name: getattr(values, f.name) for f in fields(values)}
    parts = [b"concertina-namespace", struct.pack("<I", FORMAT_VERSION)]
    for name in sorted(values):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise InvalidInputError(f"namespace field {name!r} must be str or int, not {type(value).__name__}")
        parts += [name.encode(), b"s" if isinstance(value, str) else b"i", str(value).encode()]
    return digest(*parts)


def block_key(namespace_: bytes, parent: bytes, tokens: Sequence[int] | np.ndarray) -> bytes:
    """Key of one block: H(namespace, parent key, tokens as little-endian int32)."""
    return digest(namespace_, parent, np.asarray(tokens, dtype="<i4").tobytes())


def block_keys(namespace_: bytes, tokens: Sequence[int] | np.ndarray, block_tokens: int) -> list[bytes]:
    """Keys of all *full* blocks of a sequence, in order; the partial tail has none."""
    ids = np.asarray(tokens, dtype="<i4")
    parent, keys = NO_PARENT, []
    for stop in range(block_tokens, len(ids) + 1, block_tokens):
        parent = block_key(namespace_, parent, ids[stop - block_tokens : stop])
        keys.append(parent)
    return keys
