"""Every metric that Concertina exports, declared once (DESIGN §13).

The name on the wire is ``concertina_`` + name in the table (+ ``_total`` for counters). A metric is added by one row.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "concertina_"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
FRACTIONS = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: kind (counter, gauge or histogram), help with its unit, labels, and bucket edges of a histogram."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    "arena_bytes": Metric("gauge", "Bytes of the arena by state: used, free, reserved (being written)", ("node", "state")),
    "blocks": Metric("gauge", "Resident blocks by number of fidelity layers present", ("node", "fidelity")),
    "raw_bytes": Metric("gauge", "Bytes that the resident blocks stand for, at 2 bytes a value", ("node",)),
    "stored_bytes": Metric("gauge", "Bytes of resident blocks as stored, headers included", ("node", "codec")),
    "spill_bytes": Metric("gauge", "Bytes that may be spilled, by tier and state: used, free", ("node", "tier", "state")),
    "spilled_blocks": Metric("gauge", "Blocks held by a tier behind the arena", ("node", "tier")),
    "spill_writes": Metric("counter", "Blocks written to a tier", ("node", "tier")),
    "spill_reads": Metric("counter", "Blocks read from a tier and verified", ("node", "tier")),
    "spill_dropped": Metric("counter", "Blocks that a tier did not take or lost, by reason", ("node", "tier", "reason")),
    "evictions": Metric("counter", "Blocks dropped", ("node", "policy", "reason")),
    "demotions": Metric("counter", "Fidelity layers dropped", ("node", "from", "to")),
    "admissions_rejected": Metric("counter", "Blocks that were offered and not admitted", ("node", "reason")),
    "block_distortion": Metric("histogram", "Relative squared error of blocks as stored", ("node", "part"), FRACTIONS),
    "lookup_tokens": Metric("counter", "Prompt tokens looked up, by result: hit or miss", ("result",)),
    "fetch_bytes": Metric("counter", "Bytes of encoded blocks fetched from the store"),
    "fetched_blocks": Metric("counter", "Verified blocks by the way they came: grpc, local (shared memory) or tcp", ("path",)),
    "fetch_seconds": Metric("histogram", "Time of one fetch, lookup excluded", (), SECONDS),
    "encode_seconds": Metric("histogram", "Time to encode one batch of blocks", ("codec",), SECONDS),
    "decode_seconds": Metric("histogram", "Time to decode one batch of blocks", ("codec",), SECONDS),
    "publish_queue_blocks": Metric("gauge", "Blocks that wait to be published"),
    "publish_dropped": Metric("counter", "Blocks that were not published because the queue was full or the store away", ("reason",)),
    "corrupt_blocks": Metric("counter", "Blocks that failed verification and were treated as a miss", ("where",)),
    "unreadable_blocks": Metric("counter", "Blocks treated as a miss because their codec or profile is not known here", ("reason",)),
    "leases": Metric("gauge", "Leases held by readers", ("node",)),
    "store_unavailable": Metric("counter", "Calls that went on without the store", ("part",)),
    "requests": Metric("counter", "Requests answered, by gRPC status code", ("code",)),
    "ttft_seconds": Metric("histogram", "Time to first token", (), SECONDS),
    "inter_token_seconds": Metric("histogram", "Time between two tokens of one request", (), SECONDS),
    "batch_size": Metric("histogram", "Requests in one decode step", (), COUNTS),
    "live_kv_bytes": Metric("gauge", "Bytes of live KV cache in use"),
    "rpc_seconds": Metric("histogram", "Time of one RPC of the store", ("rpc",), SECONDS),
}
_KINDS = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Metrics:
    """The table's rows as live `prometheus_client` objects in one registry, by attribute: ``metrics.evictions``.

    Parameters
    ----------
    registry : CollectorRegistry, optional
        A fresh one by default, so that several nodes can live in one process.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._metrics = {}
        for name, row in METRICS.items():
            extra = {"buckets": row.buckets} if row.kind == "histogram" else {}
            self._metrics[name] = _KINDS[row.kind](PREFIX + name, row.help, row.labels, registry=self.registry, **extra)

    def __getattr__(self, name: str):
        try:
            return self.__dict__["_metrics"][name]
        except KeyError:
            raise AttributeError(f"no metric {name!r}; add a row to kvstore.metrics.METRICS") from None


def exported_names() -> set[str]:
    """Names as Prometheus sees them, with the suffixes of counters and histograms."""
    names = set()
    for name, row in METRICS.items():
        full = PREFIX + name
        names |= {full + "_total"} if row.kind == "counter" else {full}
        if row.kind == "histogram":
            names |= {full + s for s in ("_bucket", "_sum", "_count")}
    return names
