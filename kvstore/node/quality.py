"""Which of two blocks under one key is the better one."""

from __future__ import annotations

import math

from kvstore.block import BlockHeader


def is_better(new: BlockHeader, old: BlockHeader) -> bool:
    """Whether `new` should replace `old` under the same key: a cleaner prefix first, then less error, then more layers of one codec."""

    def rank(header: BlockHeader) -> tuple[bool, float, float]:
        prefix, own = header.provenance.distortion, header.rows[header.present - 1].distortion
        return header.provenance.exact, -_worse(prefix.keys, prefix.values), -_worse(own.keys, own.values)

    ranks = rank(new), rank(old)
    if ranks[0] != ranks[1]:
        return ranks[0] > ranks[1]
    return new.codec == old.codec and new.present > old.present


def _worse(keys: float, values: float) -> float:
    """The larger error; what is no number counts as the largest."""
    return math.inf if math.isnan(keys) or math.isnan(values) else max(keys, values)
