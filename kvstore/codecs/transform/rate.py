"""How fine to quantize: the step of each layer of precision, block by block.

The price of a step comes from the coder's own tables, so what is chosen is what is written. A sequence's first token is stored in full;
its bytes are charged to the first `SINK_SPREAD` tokens alike, so that the first block is not starved to pay for it.
"""

from __future__ import annotations

from collections.abc import Callable

#: Tokens over which the exact first token is paid off. Sequences of at least that length meet the ratio asked; shorter ones fall short.
SINK_SPREAD = 256
#: A step that uses this share of the budget is good enough.
_CLOSE = 0.995


def budget_bytes(raw_bytes: int, ratio: float, tokens: int, start: int, sink_bytes: int) -> float:
    """Bytes that a block of `tokens` may take so that sequences meet `ratio`, the exact first token included."""
    share = sink_bytes * max(0, min(start + tokens, SINK_SPREAD) - start) / SINK_SPREAD
    return raw_bytes / ratio - share + (sink_bytes if start == 0 else 0)


def cheapest_within(price: Callable[[int], float], budget: float, guess: int, low: int, high: int) -> int:
    """The smallest step index in [low, high] whose price is within `budget`, or `high` if none is; about 4 evaluations.

    Parameters
    ----------
    price : callable
        Falls (nearly) with the step index.
    guess : int
        Where to look first.
    """
    too_dear, fits = low - 1, high + 1
    m, seen = min(max(guess, low), high), []
    while True:
        cost = price(m)
        seen.append((m, cost))
        if cost <= budget:
            fits = m
            if cost >= _CLOSE * budget:
                return m
        else:
            too_dear = m
        if fits - too_dear <= 1:
            return min(fits, high)
        m = min(max(_next(seen, budget), too_dear + 1), fits - 1)


def _next(seen: list[tuple[int, float]], budget: float) -> int:
    """Secant on the price, aimed at the middle of what is close enough."""
    target = budget * (1 + _CLOSE) / 2
    m, cost = seen[-1]
    slope = -max(cost, 1.0) / 42.0
    if len(seen) > 1 and seen[-2][0] != m:
        slope = min((cost - seen[-2][1]) / (m - seen[-2][0]), -1e-9)
    move = round((target - cost) / slope)
    limit = 64 << len(seen)
    return m + (max(min(move, limit), -limit) or (1 if cost > budget else -1))
