"""Which calls belong to one request of a user: the Gets of its cached prefix, and the Puts of what came after it.

A policy counts requests, not calls: a prompt whose second half is new is one use of a conversation's next turn, although it reaches a
node as a Get or two and, seconds later, as a Put or more.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable

from kvstore.clock import Clock
from kvstore.eviction.base import Request

#: A call that continues an older request than this is a request of its own.
JOIN_S = 60.0
#: Blocks remembered with the request that used them last.
MAX_BLOCKS = 16_384


class Requests:
    """Numbers requests; a call joins the one that last used the block before its first, if their prompts are equally long."""

    def __init__(self, clock: Clock) -> None:
        self.count = 0
        self._clock = clock
        self._numbers = itertools.count(1)
        self._by_block: OrderedDict[bytes, Request] = OrderedDict()

    def __len__(self) -> int:
        """Blocks remembered."""
        return len(self._by_block)

    def begin(self, input_tokens: int = 0, after: bytes | None = None) -> Request:
        """The request of a call that begins now.

        Parameters
        ----------
        input_tokens : int
            Length of the prompt; a call that does not say is a request of its own.
        after : bytes, optional
            Id of the parent of the call's first block.
        """
        now = self._clock.now()
        before = self._by_block.get(after) if after and input_tokens else None
        if before is not None and before.input_tokens == input_tokens and now - before.now <= JOIN_S:
            return Request(before.seq, now, input_tokens)
        self.count += 1
        return Request(next(self._numbers), now, input_tokens)

    def used(self, request: Request, ids: Iterable[bytes]) -> None:
        """Note that the request used or wrote these blocks."""
        for id in ids:
            self._by_block[id] = request
            self._by_block.move_to_end(id)
        self._forget(request.now - JOIN_S)

    def _forget(self, before: float) -> None:
        """Let go of what no call can join any more, and of the oldest of too many."""
        blocks = self._by_block
        while blocks and (len(blocks) > MAX_BLOCKS or next(iter(blocks.values())).now < before):
            blocks.popitem(last=False)
