"""Measured rates, from which it is decided how long the store may take and whether it is worth asking."""

from __future__ import annotations

from dataclasses import dataclass

#: Weight of a new measurement.
WEIGHT = 0.3
#: A store that was too slow is tried again after so many requests.
RETRY_EVERY = 8


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
    fetch_s_per_token: float = 0.0
    _skipped: int = 0

    def prefilled(self, tokens: int, seconds: float) -> None:
        """One prefill step was measured."""
        if seconds > 0:
            self.prefill_tokens_per_s += WEIGHT * (tokens / seconds - self.prefill_tokens_per_s)

    def fetched(self, tokens: int, seconds: float) -> None:
        """One fetch and decode was measured."""
        if tokens > 0:
            old, new = self.fetch_s_per_token, seconds / tokens
            self.fetch_s_per_token = new if old == 0 else old + WEIGHT * (new - old)

    def store_budget_s(self, tokens: int) -> float:
        """Seconds that a request of `tokens` may spend on the store: half of what recomputing takes, within the bounds."""
        return min(max(0.5 * tokens / self.prefill_tokens_per_s, self.floor_s), self.ceiling_s)

    def worth_fetching(self) -> bool:
        """Whether a fetched token comes sooner than a recomputed one; now and then yes regardless, to measure again."""
        if self.always or self.fetch_s_per_token * self.prefill_tokens_per_s < 1:
            self._skipped = 0
            return True
        self._skipped = (self._skipped + 1) % RETRY_EVERY
        return self._skipped == 0
