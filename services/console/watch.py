"""What nodes and workers say of themselves on their metrics pages, as one object a sample, with rates against the sample before."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kvstore.clock import Clock, SystemClock
from kvstore.metadata import NodeRecord, WorkerRecord
from kvstore.metrics import PREFIX
from services.system.members import members

PAGE_TIMEOUT_S = 2.0
MAX_PAGE_BYTES = 4 << 20
MAX_PAGES = 256

#: Field of a node -> (metric, labels that must match). Values of all matching series are added.
NODE_FIGURES: dict[str, tuple[str, dict[str, str]]] = {
    "used_bytes": ("arena_bytes", {"state": "used"}),
    "free_bytes": ("arena_bytes", {"state": "free"}),
    "reserved_bytes": ("arena_bytes", {"state": "reserved"}),
    "blocks": ("blocks", {}),
    "raw_bytes": ("raw_bytes", {}),
    "stored_bytes": ("stored_bytes", {}),
    "evictions": ("evictions_total", {}),
    "demotions": ("demotions_total", {}),
    "leases": ("leases", {}),
}
WORKER_FIGURES: dict[str, tuple[str, dict[str, str]]] = {
    "requests": ("requests_total", {}),
    "hit_tokens": ("lookup_tokens_total", {"result": "hit"}),
    "miss_tokens": ("lookup_tokens_total", {"result": "miss"}),
    "fetched_bytes": ("fetch_bytes_total", {}),
    "live_kv_bytes": ("live_kv_bytes", {}),
    "publish_queue_blocks": ("publish_queue_blocks", {}),
    "publish_dropped": ("publish_dropped_total", {}),
    "tokens": ("inter_token_seconds_count", {}),
    "ttft_s": ("ttft_seconds_sum", {}),
    "first_tokens": ("ttft_seconds_count", {}),
}
#: Figures that only grow; each gets a companion ``<name>_per_s``.
COUNTERS = ("evictions", "demotions", "requests", "hit_tokens", "miss_tokens", "fetched_bytes", "tokens")

Members = Callable[[str], tuple[list[NodeRecord], list[WorkerRecord]]]


class Watch:
    """Takes samples of the system whose metadata are at `redis`.

    Parameters
    ----------
    redis : str
    clock : Clock, optional
    who : callable, optional
        Gives the living nodes and workers for a Redis URL.
    """

    def __init__(self, redis: str, clock: Clock | None = None, who: Members = members) -> None:
        self._redis = redis
        self._clock = clock or SystemClock()
        self._who = who
        self._before: dict[str, dict[str, Any]] = {}
        self._at = 0.0

    def sample(self) -> dict[str, Any]:
        """``{"seconds", "nodes": [...], "workers": [...]}``; a page that does not answer leaves its figures null.

        Raises
        ------
        TransportError, DeadlineError
            Where Redis does not answer.
        """
        nodes, workers = self._who(self._redis)
        now = self._clock.now()
        elapsed_s = now - self._at if self._before else 0.0
        with ThreadPoolExecutor(8) as pool:
            pages = list(pool.map(_page, [member.metrics for member in [*nodes, *workers][:MAX_PAGES]]))
        rows = [_row(node, page, NODE_FIGURES, ("address", "device", "arena_bytes")) for node, page in zip(nodes, pages, strict=False)]
        others = [_row(w, page, WORKER_FIGURES, ("engine", "device")) for w, page in zip(workers, pages[len(nodes) :], strict=False)]
        for row in [*rows, *others]:
            _add_rates(row, self._before.get(row["id"], {}), elapsed_s)
        self._before, self._at = {row["id"]: row for row in [*rows, *others]}, now
        return {"seconds": round(elapsed_s, 3), "nodes": rows, "workers": others}


def hit_rate(workers: list[dict[str, Any]]) -> float | None:
    """Share of all prompt tokens that came from the store; None before the first prompt."""
    hit, miss = (sum(worker[name] or 0 for worker in workers) for name in ("hit_tokens", "miss_tokens"))
    return hit / (hit + miss) if hit + miss else None


def _page(address: str | None) -> str | None:
    """The metrics page at ``host:port``; None where there is none or it does not answer."""
    if not address:
        return None
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=PAGE_TIMEOUT_S) as reply:
            return reply.read(MAX_PAGE_BYTES).decode(errors="replace")
    except OSError:
        return None


def _row(member: Any, page: str | None, figures: dict[str, tuple[str, dict[str, str]]], facts: tuple[str, ...]) -> dict[str, Any]:
    totals: dict[str, float] = {}
    if page is not None:
        wanted = {PREFIX + metric: [] for metric, _ in figures.values()}
        for family in text_string_to_metric_families(page):
            for series in family.samples:
                if series.name in wanted:
                    wanted[series.name].append(series)
        for name, (metric, labels) in figures.items():
            totals[name] = sum(s.value for s in wanted[PREFIX + metric] if labels.items() <= s.labels.items())
    return {"id": member.id, **{fact: getattr(member, fact) for fact in facts}, **{name: totals.get(name) for name in figures}}


def _add_rates(row: dict[str, Any], before: dict[str, Any], elapsed_s: float) -> None:
    """Null in the first sample, and where a restart has set the counter back."""
    for name in COUNTERS:
        if name in row:
            now, then = row[name], before.get(name)
            known = now is not None and then is not None and elapsed_s > 0 and now >= then
            row[f"{name}_per_s"] = (now - then) / elapsed_s if known else None
