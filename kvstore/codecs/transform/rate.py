"""How fine to quantize: the step of each layer of precision, block by block.

The price of a step comes from the coder's own tables, so what is chosen is what is written. A sequence's first token is stored in full;
its bytes are charged to the first `SINK_SPREAD` tokens alike, so that the first block is not starved to pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: Tokens over which the exact first token is paid off. Sequences of at least that length meet the ratio asked; shorter ones fall short.
SINK_SPREAD = 256
#: A step that uses this share of the budget is good enough.
_CLOSE = 0.995
#: Fall of the price's logarithm with one step index where nothing was measured yet, and the least that is believed.
_USUAL_FALL, _LEAST_FALL = 1 / 42, 1e-4
#: Step indices over which a measured fall tells the price of a neighbour well enough, and between the two prices that tell it.
_SURE, _APART = 1.5, 24
#: Bytes that stand for none, for logarithms.
_LEAST = 1e-9


def budget_bytes(raw_bytes: int, ratio: float, tokens: int, start: int, sink_bytes: int) -> float:
    """Bytes that a block of `tokens` may take so that sequences meet `ratio`, the exact first token included."""
    share = sink_bytes * max(0, min(start + tokens, SINK_SPREAD) - start) / SINK_SPREAD
    return raw_bytes / ratio - share + (sink_bytes if start == 0 else 0)


def cheapest_within(price: Callable[[int], float], budget: float, guess: int, low: int, high: int) -> int:
    """The smallest step index in [low, high] whose price is within `budget`, or `high` if none is; about 3 evaluations.

    The search ends when a measured price is close to the budget, or so near to it that the fall of the price between the last two
    says which index is the one: what is written is no dearer than `budget` but for a fraction of a per cent.

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
        crossing, sure = _crossing(seen, budget)
        m = min(max(math.ceil(crossing), too_dear + 1), fits, high)
        if m == fits or sure:
            return m


def _crossing(seen: list[tuple[int, float]], budget: float) -> tuple[float, bool]:
    """The index at which the price meets `budget`, by the fall of its logarithm, and whether that is certain to be the nearest."""
    (m, cost), fall, apart = seen[-1], _USUAL_FALL, math.inf
    if len(seen) > 1:
        before, dear = seen[-2]
        apart = abs(before - m)
        fall = max(math.log(max(dear, _LEAST) / max(cost, _LEAST)) / (m - before), _LEAST_FALL)
    move = math.log(max(cost, _LEAST) / max(budget, _LEAST)) / fall
    limit = 64 << len(seen)
    return m + max(min(move, limit), -limit), abs(move) <= _SURE and apart <= _APART
