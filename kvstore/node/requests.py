"""Which calls belong to one request of a user: the Gets of its cached prefix, and the Puts of what came after it.

A policy counts requests, not calls: a prompt whose second half is new is one use of a conversation's next turn, although it reaches a
node as a Get or two and, seconds later, as a Put or more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvstore.clock import Clock
from kvstore.eviction.base import Request

#: A call that continues an older request than this is a request of its own.
JOIN_S = 60.0
#: Blocks remembered with the request that used them last; half of them are forgotten at once.
MAX_BLOCKS = 16_384


class Requests:
    """Numbers requests; a call joins the one that last used the block before its first, if their prompts are equally long."""

    def __init__(self, clock: Clock) -> None:
        self.count = 0
        self._clock = clock
        self._numbers = itertools.count(1)
        #: By block, what was used since `_since`, and what was used before that and perhaps since.
        self._recent: dict[bytes, Request] = {}
        self._older: dict[bytes, Request] = {}
        self._since = clock.now()

    def __len__(self) -> int:
        """Blocks remembered, some of them twice."""
        return len(self._recent) + len(self._older)

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
        before = (self._recent.get(after) or self._older.get(after)) if after and input_tokens else None
        if before is not None and before.input_tokens == input_tokens and now - before.now <= JOIN_S:
            return Request(before.seq, now, input_tokens)
        self.count += 1
        return Request(next(self._numbers), now, input_tokens)

    def used(self, request: Request, ids: Sequence[bytes]) -> None:
        """Note that the request used or wrote these blocks."""
        ids = ids[-(MAX_BLOCKS // 2) :]
        if 2 * (len(self._recent) + len(ids)) > MAX_BLOCKS or request.now - self._since > JOIN_S:
            self._older, self._recent, self._since = self._recent, {}, request.now
        self._recent.update(dict.fromkeys(ids, request))
