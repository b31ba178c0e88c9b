"""Encode blocks of live caches for the store, off the critical path.

The model's thread offers finished blocks and calls `work` between its steps, so encoding never runs beside the model and slows it
(on few cores two thread pools at once cost far more than their sum); `due` bounds the share of time that it takes from running
requests. What waits is copied to pages of its own at the far end of the pool: held among the requests' pages, it would cut them up and
spread them over memory that was never touched.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.block import EncodedBlock, Provenance
from kvstore.clock import Clock
from kvstore.codecs import Codec
from kvstore.errors import ConcertinaError
from kvstore.metrics import Metrics

from .live import LivePool

#: Blocks encoded in one go when nobody waits for the model, and while requests run; by where they are. A GPU takes about as long for a few.
IDLE_BLOCKS, BUSY_BLOCKS = {"cpu": 4, "cuda": 32}, {"cpu": 1, "cuda": 8}
log = logging.getLogger(__name__)

#: Asks which of the blocks with these keys are ours to write, and has the answer given to a function, from any thread.
Claim = Callable[[Sequence[bytes], Callable[[Sequence[bool]], None]], None]
#: Takes encoded blocks and the length of the prompt they belong to.
Deliver = Callable[[Sequence[EncodedBlock], int], None]


@dataclass(slots=True)
class Chain:
    """Consecutive blocks of one request, in `pages` of `pool`, the first at position `start`.

    `keys` has one key a block, after that of the block before the first.
    """

    pool: LivePool
    pages: Sequence[int]
    start: int
    tokens: Sequence[int]
    keys: Sequence[bytes]
    namespace: bytes
    provenance: Provenance
    input_tokens: int
    #: Which of the blocks nobody else is writing; None until that is known.
    ours: Sequence[bool] | None = None


class BlockWriter:
    """A bounded queue of blocks to encode. One thread calls everything.

    Parameters
    ----------
    codec : Codec
        `codec` may be set to another one between two calls.
    claim : callable
        Answers soon; what waits is not encoded before.
    deliver : callable
        Gets the encoded blocks in order; must not block.
    limit : int
        Blocks that may wait; what is beyond is dropped.
    share : float
        Most of the time that `due` gives to encoding.
    """

    def __init__(
        self, codec: Codec, claim: Claim, deliver: Deliver, limit: int, share: float, metrics: Metrics, clock: Clock
    ) -> None:  # fmt: skip
        self.codec, self._claim, self._deliver, self._limit, self._share = codec, claim, deliver, limit, share
        self._metrics, self._clock = metrics, clock
        self._queue: deque[tuple[Chain, int]] = deque()
        self._not_before = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, chain: Chain) -> None:
        """Queue the blocks of `chain`, the leading ones that there is room for."""
        count = len(chain.keys) - 1
        taken = max(0, min(count, self._limit - len(self._queue)))
        if taken < count:
            self._metrics.publish_dropped.labels(reason="encode_full").inc(count - taken)
        chain.pages = chain.pool.set_aside(chain.pages[:taken])
        self._queue.extend((chain, i) for i in range(taken))
        self._claim(chain.keys[1 : taken + 1], lambda ours: setattr(chain, "ours", ours))

    def due(self, busy: bool) -> bool:
        """Whether there is something to encode, and with `busy`, whether that may take time from running requests now."""
        return bool(self._queue) and self._queue[0][0].ours is not None and (not busy or self._clock.now() >= self._not_before)

    def work(self, busy: bool) -> None:
        """Encode a few blocks and deliver them, or find that somebody else does. May be called before it is `due`."""
        chain, first = self._queue[0]
        if chain.ours is not None and not chain.ours[first]:
            self._queue.popleft()
            chain.pool.pages.give([chain.pages[first]])
            return
        count, most = 0, (BUSY_BLOCKS if busy else IDLE_BLOCKS)[chain.pool.device.type]
        while count < most and self._queue and self._queue[0][0] is chain:
            if chain.ours is not None and not chain.ours[first + count]:
                break
            self._queue.popleft()
            count += 1
        began = self._clock.now()
        try:
            blocks = self._encode(chain, first, count)
        except ConcertinaError as error:
            # Such as NaN in the cache: the request has its answer, the store simply does not get the block.
            log.warning("%d blocks could not be encoded: %s", count, error)
            self._metrics.publish_dropped.labels(reason="encode_failed").inc(count)
            return
        finally:
            chain.pool.pages.give(chain.pages[first : first + count])
        seconds = self._clock.now() - began
        self._not_before = began + seconds / self._share
        self._metrics.encode_seconds.labels(codec=self.codec.name).observe(seconds)
        self._deliver(blocks, chain.input_tokens)

    def _encode(self, chain: Chain, first: int, count: int) -> list[EncodedBlock]:
        size = chain.pool.block_tokens
        keys, values = chain.pool.blocks(chain.pages[first : first + count])
        starts = [chain.start + (first + i) * size for i in range(count)]
        tokens = [chain.tokens[(first + i) * size : (first + i + 1) * size] for i in range(count)]
        encoded = self.codec.encode(keys, values, start=starts, tokens=tokens)
        named = zip(encoded, chain.keys[first : first + count], chain.keys[first + 1 : first + count + 1], strict=True)
        return [block.with_identity(key, chain.namespace, parent, chain.provenance) for block, parent, key in named]
