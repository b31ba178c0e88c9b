"""Measured rates, from which it is decided how long the store may take and whether it is worth asking."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Weight of a new measurement.
WEIGHT = 0.3
#: Deviations above the mean that a fetch is taken to last: a cached answer is to be the quicker one in 19 of 20 cases.
CAUTION = 2.0
#: Where a fetch was found to be too slow, one of so many is made all the same, to measure again.
RETRY_EVERY = 8


@dataclass(slots=True)
class Spent:
    """Moving averages of what fetches of about the same number of blocks took, and of how far they were off, in seconds."""

    mean_s: float
    deviation_s: float = 0.0

    def note(self, seconds: float) -> None:
        self.deviation_s += WEIGHT * (abs(seconds - self.mean_s) - self.deviation_s)
        self.mean_s += WEIGHT * (seconds - self.mean_s)


@dataclass(slots=True)
class Rates:
    """Moving averages. Written by one thread each, read by both; a stale number does no harm.

    Parameters
    ----------
    prefill_tokens_per_s : float
        First estimate, from start-up.
    floor_s, ceiling_s : float
        Bounds of `store_budget_s`.
    always : bool
        What `worth_fetching` says, whatever was measured.
    """

    prefill_tokens_per_s: float
    floor_s: float
    ceiling_s: float
    always: bool = False
    #: By the number of blocks, rounded up to a power of two. A fetch has fixed costs, so few blocks say little of many.
    _spent: dict[int, Spent] = field(default_factory=dict)
    _skipped: int = 0

    def prefilled(self, tokens: int, seconds: float) -> None:
        """One prefill step was measured."""
        if seconds > 0:
            self.prefill_tokens_per_s += WEIGHT * (tokens / seconds - self.prefill_tokens_per_s)

    def fetched(self, blocks: int, seconds: float) -> None:
        """One fetch and decode was measured."""
        if blocks > 0:
            self._spent.setdefault(_size(blocks), Spent(seconds)).note(seconds)

    def fetch_s(self, blocks: int) -> float:
        """Seconds that fetching and decoding so many blocks will hardly exceed; 0 while nothing is known.

        From the next measured size above, which took no less, or the next below, in proportion.
        """
        size = _size(blocks)
        known = min((s for s in self._spent if s >= size), default=None) or max(self._spent, default=None)
        if known is None:
            return 0.0
        spent = self._spent[known]
        return (spent.mean_s + CAUTION * spent.deviation_s) * max(1.0, size / known)

    def store_budget_s(self, tokens: int) -> float:
        """Seconds that a request of `tokens` may spend on the store: half of what recomputing takes, within the bounds."""
        return min(max(0.5 * tokens / self.prefill_tokens_per_s, self.floor_s), self.ceiling_s)

    def worth_fetching(self, blocks: int, block_tokens: int) -> bool:
        """Whether so many blocks come sooner from the store than computed; now and then yes regardless, to measure again."""
        if self.always or self.fetch_s(blocks) * self.prefill_tokens_per_s < blocks * block_tokens:
            return True
        self._skipped = (self._skipped + 1) % RETRY_EVERY
        return self._skipped == 0


def _size(blocks: int) -> int:
    return 1 << (blocks - 1).bit_length()
