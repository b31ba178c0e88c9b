"""The names of a prompt's blocks: namespace and keys."""

from __future__ import annotations

from kvstore.identity import NamespaceFields, block_keys, namespace
from kvstore.layout import KVLayout, dtype_name

from .base import CacheMode, GenerateSpec
from .job import Prefix
from .live import LiveKV


class BlockNames:
    """Names blocks of one model.

    Parameters
    ----------
    layout : KVLayout
    fingerprint : str
        Of the model.
    block_tokens : int
    """

    def __init__(self, layout: KVLayout, fingerprint: str, block_tokens: int) -> None:
        self._layout, self._fingerprint, self._block_tokens = layout, fingerprint, block_tokens

    def namespace(self, tenant: str) -> bytes:
        """The namespace of one tenant's blocks."""
        lay = self._layout
        return namespace(
            NamespaceFields(
                model=self._fingerprint, dtype=dtype_name(lay.dtype), layers=lay.layers, kv_heads=lay.kv_heads, head_dim=lay.head_dim,
                rope=lay.rope.canonical(), block_tokens=self._block_tokens, tenant=tenant,
            )
        )  # fmt: skip

    def prefix(self, spec: GenerateSpec, kv: LiveKV) -> Prefix:
        """An empty prefix with the names that the request may use: none where it bypasses the store, no publishing where it only reads."""
        if spec.cache_mode is CacheMode.BYPASS:
            return Prefix(kv)
        name = self.namespace(spec.tenant)
        keys = block_keys(name, spec.tokens, self._block_tokens)
        return Prefix(kv, namespace=name, publish=spec.cache_mode is CacheMode.USE, keys=keys)
