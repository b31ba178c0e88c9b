"""Benchmarks: one file each, found through `BENCHES` and imported only when it is run.

A benchmark module has ``configure(parser)``, which adds its own arguments; ``run(args) -> Result``; and ``render(result) -> str``, which
makes the table for people from nothing but the result. It may have ``plot(result) -> str``, an SVG. `base.py` holds `Result` and the
helpers of all of them.
"""

from __future__ import annotations

#: Benchmark -> (module, one line of help). ``make bench`` runs all, in this order.
BENCHES: dict[str, tuple[str, str]] = {
    "codecs": ("services.bench.codecs", "encode and decode of every codec, against a memory copy and the model's own prefill"),
    "eviction": ("services.bench.eviction", "live nodes against the replay, a working set that outgrows memory, and puts under eviction"),
    "index": ("services.bench.index", "what the index of a million blocks costs Redis, in bytes and time"),
    "peers": ("services.bench.peers", "this store beside those of LMCache and Mooncake, where their wheels are installed, and Redis"),
    "serving": ("services.bench.serving", "the engine beside plain transformers and vLLM, and what gRPC and HTTP cost; --load: overload"),
    "spill": ("services.bench.spill", "blocks written to, read from and found again in the tiers behind an arena"),
    "store": ("services.bench.store", "get and put by gRPC, TCP and shared memory beside plain copies and Redis; lookups; delivery"),
    "ttft": ("services.bench.ttft", "time to first token cold and warm, by codec and path, and under many requests at once"),
}
