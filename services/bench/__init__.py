"""Benchmarks: one file each, found through `BENCHES` and imported only when it is run.

A benchmark module has ``configure(parser)``, which adds its own arguments; ``run(args) -> Result``; and ``render(result) -> str``, which
makes the table for people from nothing but the result. `base.py` holds `Result` and the helpers of all of them.
"""

from __future__ import annotations

#: Benchmark -> (module, one line of help). ``make bench`` runs all, in this order.
BENCHES: dict[str, tuple[str, str]] = {
    "codecs": ("services.bench.codecs", "encode and decode of every codec, against a memory copy and the model's own prefill"),
}
