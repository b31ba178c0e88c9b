"""``int2``: K per channel, V per token and rotated, groups of 32 fitted by least squares, the first token exact."""

from __future__ import annotations

from .grouped import GroupedCodec


class Int2Codec(GroupedCodec):
    """Four levels a group. For what must be small and may be wrong: `transform` is far better at the same size."""

    name = "int2"
    wire_id = 4
    bits = 2
    group = 32
    refits = 2
    rotate_values = True
