"""All policies beside each other: a table of hit rates by capacity, and a picture with `opt` as the ceiling."""

from __future__ import annotations

from kvstore.eviction import create, names
from kvstore.eviction.replay import Ladder, Outcome, capacity_of, replay
from kvstore.eviction.trace import Trace
from services.plot import line_plot
from services.progress import Progress

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def compare(trace: Trace, ladder: Ladder) -> list[Outcome]:
    """Every policy at every share of `SHARES`, in that order of loops."""
    outcomes = []
    for policy in names():
        for share in SHARES:
            with Progress(f"{policy} at {share:.0%}") as progress:
                outcomes.append(replay(trace, create(policy), capacity_of(trace, share), ladder, progress))
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Token hit rates in percent; where a ladder costs quality, the quality-weighted rate follows a slash."""
    lines = ["token hit % at   " + "".join(f"{share:>13.0%}" for share in SHARES)]
    for start in range(0, len(outcomes), len(SHARES)):
        row = outcomes[start : start + len(SHARES)]
        lines.append(f"{row[0].policy:<17}" + "".join(f"{_cell(outcome):>13}" for outcome in row))
    return "\n".join(lines)


def plot(trace: Trace, outcomes: list[Outcome]) -> str:
    """An SVG of token hit rate against capacity, one line a policy."""
    series: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        point = (100 * outcome.capacity_blocks / trace.distinct_blocks, 100 * outcome.token_hit_rate)
        series.setdefault(outcome.policy, []).append(point)
    return line_plot(
        series,
        title=f"Eviction policies on {trace.name}",
        x_label="capacity, % of distinct blocks",
        y_label="tokens hit, %",
        log_x=True,
    )


def _cell(outcome: Outcome) -> str:
    hit, weighted = 100 * outcome.token_hit_rate, 100 * outcome.quality_weighted_hit_rate
    return f"{hit:.1f}" if abs(hit - weighted) < 1e-9 else f"{hit:.1f}/{weighted:.1f}"
