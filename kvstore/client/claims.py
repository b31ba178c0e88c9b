"""Claims: of many workers that have computed the same block, one encodes and writes it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstore.errors import ConcertinaError

from .membership import Membership

#: Time for encoding and writing. Who takes longer, or dies, has the block written by whoever computes it next.
TTL_S = 10.0
#: Claims that are remembered, to be given up early; beyond it all are left to expire.
MAX_OWN = 1 << 16
log = logging.getLogger(__name__)


class Claims:
    """What this client has claimed. One event loop uses it.

    A claim spares work and guards nothing: two that write the same block do no harm. So whatever goes wrong, the block is ours.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._own: set[bytes] = set()

    async def take(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these blocks are ours to write."""
        if not keys:
            return []
        try:
            ours = await self._membership.require().claim(keys, TTL_S)
        except ConcertinaError as error:
            log.debug("blocks are written without a claim: %s", error)
            return [True] * len(keys)
        if len(self._own) > MAX_OWN:
            self._own.clear()
        self._own.update(key for key, own in zip(keys, ours, strict=True) if own)
        return ours

    async def release(self, keys: Sequence[bytes]) -> None:
        """These blocks have been dealt with; those that were not claimed here are ignored."""
        own = [key for key in keys if key in self._own]
        self._own.difference_update(own)
        if own:
            try:
                await self._membership.require().unclaim(own)
            except ConcertinaError as error:
                log.debug("claims are left to expire: %s", error)
