"""Which leading blocks of a prompt are in the store: one round trip, whatever their number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvstore.errors import ConcertinaError, InvalidInputError
from kvstore.metadata import Location, NodeRecord
from kvstore.metadata.base import check_keys

from .membership import Membership

log = logging.getLogger(__name__)

#: Index entries of dead incarnations that wait to be removed; more are left for another lookup to meet.
MAX_TIDY_KEYS = 8192


class Hit(NamedTuple):
    """A block that a living node has announced: where, stored bytes, layers of precision, and how many nodes have it as good."""

    key: bytes
    node: NodeRecord
    size_bytes: int
    fidelity: int
    copies: int = 1


class Lookup:
    """Finds the longest cached prefix, and has the index entries of dead nodes removed on the way."""

    def __init__(self, membership: Membership, tidy_after_s: float) -> None:
        self._membership = membership
        self._tidy_after_s = tidy_after_s
        self._dead: dict[str, set[bytes]] = {}
        self._tidying: asyncio.Task[None] | None = None

    async def prefix(self, keys: Sequence[bytes], deadline_s: float) -> list[Hit]:
        """The leading run of `keys` that are all on living nodes; empty when the metadata is away or slower than `deadline_s`.

        Raises InvalidInputError for a key that is not 32 bytes.
        """
        if not keys:
            return []
        try:
            async with asyncio.timeout(deadline_s):
                return await self._prefix(keys)
        except TimeoutError:
            self._membership.count("redis")
        except InvalidInputError:
            raise
        except ConcertinaError as error:
            log.debug("lookup goes on without the store: %s", error)
        return []

    async def _prefix(self, keys: Sequence[bytes]) -> list[Hit]:
        found = await self.locate(keys)
        hits = self._hits(keys, found)
        different = {id(places): places for places in found}.values()
        strangers = {place.incarnation for places in different for place in places} - self._membership.everyone().keys()
        if len(hits) < len(keys) and [s for s in sorted(strangers) if self._membership.stranger_for_s(s) is None]:  # all are noted
            # A node that joined since the last read. One that is dead costs this once, then it is a known stranger.
            await self._membership.next_read()
            hits = self._hits(keys, found)
        if strangers:
            self._tidy(keys, found, strangers - self._membership.everyone().keys())
        return hits

    async def locate(self, keys: Sequence[bytes]) -> list[tuple[Location, ...]]:
        """`Metadata.locate` behind the circuit breaker. Raises InvalidInputError for a malformed key, else what the metadata raises."""
        check_keys(keys)
        metadata = self._membership.require()
        try:
            return await metadata.locate(keys)
        except ConcertinaError as error:
            self._membership.lost(error)
            raise

    def _hits(self, keys: Sequence[bytes], found: Sequence[tuple[Location, ...]]) -> list[Hit]:
        living = self._membership.living()
        chosen: dict[int, list[tuple[NodeRecord, int, int, int]]] = {}  # a prompt of 2,000 blocks has few different holders
        hits: list[Hit] = []
        for key, places in zip(keys, found, strict=True):
            copies = chosen.get(id(places))
            if copies is None:
                copies = chosen[id(places)] = _best(places, living)
            if not copies:
                break
            # Among equally good copies the key decides, so that a chain with copies is read from all nodes.
            node, size_bytes, fidelity, count = copies[key[-1] % len(copies)] if len(copies) > 1 else copies[0]
            hits.append(Hit(key, node, size_bytes, fidelity, count))
        return hits

    def _tidy(self, keys: Sequence[bytes], found: Sequence[tuple[Location, ...]], strangers: set[str]) -> None:
        """Remove, later and in the background, entries of incarnations that have been dead for long."""
        dead = {s for s in strangers if (self._membership.stranger_for_s(s) or 0.0) >= self._tidy_after_s}
        if not dead:
            return
        waiting = sum(map(len, self._dead.values()))
        for key, places in zip(keys, found, strict=True):
            for place in places:
                if place.incarnation in dead and waiting < MAX_TIDY_KEYS:
                    self._dead.setdefault(place.incarnation, set()).add(key)
                    waiting += 1
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self._withdraw())

    async def _withdraw(self) -> None:
        try:
            while self._dead:
                incarnation, keys = self._dead.popitem()
                await self._membership.require().withdraw(incarnation, sorted(keys))
        except ConcertinaError as error:
            log.debug("entries of dead nodes stay for now: %s", error)

    async def stop(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)


def _best(places: Sequence[Location], living: Mapping[str, NodeRecord]) -> list[tuple[NodeRecord, int, int, int]]:
    """All of `Hit` but the key, for each copy that no living node has better."""
    alive = [place for place in places if place.incarnation in living]
    best = max((place.fidelity for place in alive), default=0)
    copies = [place for place in alive if place.fidelity == best]
    return [(living[place.incarnation], place.size_bytes, place.fidelity, len(copies)) for place in copies]
