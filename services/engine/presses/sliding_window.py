"""``sliding_window``: the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453, §3.2).

The first few tokens, the attention sinks, take up attention that has no better place; without them a window breaks down. Unlike the
paper, keys keep the positions that they were computed at.
"""

from __future__ import annotations

from .base import Press

#: Four are enough for every model of the paper.
SINK_TOKENS = 4


class SlidingWindow(Press):
    """Sinks and window."""

    name = "sliding_window"
    min_budget = 2 * SINK_TOKENS

    def keep(self, length: int, room: int) -> list[tuple[int, int]]:
        recent = max(1, self.budget - room - SINK_TOKENS)
        if length <= SINK_TOKENS + recent:
            return [(0, length)]
        return [(0, SINK_TOKENS), (length - recent, length)]
