"""A sample as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvstore.settings import format_size

from .watch import hit_rate


def tables(name: str, sample: dict[str, Any]) -> Group:
    """One table of nodes, one of workers, and a line for the whole cluster."""
    return Group(_summary(name, sample), _nodes(sample["nodes"]), _workers(sample["workers"]))


def _summary(name: str, sample: dict[str, Any]) -> Text:
    raw, stored = (sum(node[key] or 0 for node in sample["nodes"]) for key in ("raw_bytes", "stored_bytes"))
    rate = hit_rate(sample["workers"])
    ratio = f"{raw / stored:.1f}× smaller" if stored else "no blocks yet"
    return Text(f"{name}: {format_size(raw)} of keys and values in {format_size(stored)}, {ratio}; hit rate {_share(rate)}")


def _nodes(nodes: list[dict[str, Any]]) -> Table:
    table = _table("node", "arena used", "full", "blocks", "ratio", "evicted /s", "demoted /s", "leases")
    for node in nodes:
        used, arena, stored = node["used_bytes"], node["arena_bytes"], node["stored_bytes"]
        table.add_row(
            node["id"], _size(used), _share(used / arena if used is not None and arena else None), _count(node["blocks"]),
            f"{node['raw_bytes'] / stored:.1f}×" if stored else "–", _count(node["evictions_per_s"]), _count(node["demotions_per_s"]),
            _count(node["leases"]),
        )  # fmt: skip
    return table


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = _table("worker", "requests /s", "tokens /s", "mean TTFT", "hit rate", "fetched /s", "live KV", "to publish")
    for worker in workers:
        first = worker["first_tokens"]
        table.add_row(
            worker["id"], _count(worker["requests_per_s"]), _count(worker["tokens_per_s"]),
            f"{1000 * worker['ttft_s'] / first:.0f} ms" if first else "–", _share(hit_rate([worker])),
            _size(worker["fetched_bytes_per_s"]), _size(worker["live_kv_bytes"]), _count(worker["publish_queue_blocks"]),
        )  # fmt: skip
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _size(value: float | None) -> str:
    return "–" if value is None else format_size(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")
