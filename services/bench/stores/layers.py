"""Layer-wise delivery: when the lowest quarter of the model's layers is there of all blocks, beside the time that whole blocks take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from kvstore.block import EncodedBlock
from kvstore.client import Sections
from kvstore.settings import format_size

from ..base import Result, log, relative_speed, take_turns
from .base import Values
from .concertina import ByGrpc, ByTcp, Concertina
from .party import ROOM, servers

WAYS = {"grpc": ByGrpc, "tcp": ByTcp}
#: Of the model that the blocks are made for.
LAYERS = 32
SIZES, QUICK_SIZES = (2 << 20, 8 << 20), (2 << 20,)
COUNT = 32


class LayeredValues(Values):
    """Values as blocks whose sections certify themselves."""

    @cached_property
    def blocks(self) -> list[EncodedBlock]:
        return [EncodedBlock.build(replace(b.header, layers=LAYERS), b.payload, sectioned=True) for b in super().blocks]


def measure(result: Result, redis_url: str, quick: bool) -> None:
    """Add the samples, rows and ratios of every way and size to `result`."""
    for size in QUICK_SIZES if quick else SIZES:
        log(f"the lowest layers of {COUNT} blocks of {format_size(size)}")
        there, total = {"redis": redis_url, "device": "cpu"}, COUNT * size
        with servers(there, arena_bytes=int(ROOM * total) + (64 << 20), copy_bytes=1) as ports:
            values = LayeredValues(COUNT, size)
            stores = {name: way(values, there | ports) for name, way in WAYS.items()}
            try:
                next(iter(stores.values())).put()
                _case(result, stores, size)
            finally:
                for store in stores.values():
                    store.close()


def _case(result: Result, stores: dict[str, Concertina], size: int) -> None:
    lowest: dict[str, list[float]] = {name: [] for name in stores}
    contestants: dict[str, Callable[[], object]] = {}
    for name, store in stores.items():
        store.before_get()
        contestants |= {f"{name}.whole": store.get, f"{name}.by_layers": _by_layers(store, lowest[name])}
    rounds = result.configuration["rounds"]
    samples = take_turns(contestants, rounds)
    samples |= {f"{name}.lowest": seconds[-rounds:] for name, seconds in lowest.items()}
    result.samples |= {f"layers.{size}.{name}_s": seconds for name, seconds in samples.items()}
    for name in stores:
        shares = {f"{what}_to_whole": relative_speed(samples, f"{name}.whole", f"{name}.{what}") for what in ("lowest", "by_layers")}
        result.rows.append({"layers": name, "block_bytes": size, "blocks": COUNT, **shares})
        result.ratios |= {f"layers.{size}.{name}_{what}": share for what, share in shares.items()}


def _by_layers(store: Concertina, lowest_s: list[float]) -> Callable[[], Any]:
    """Get all blocks by layers, and note when the lowest of the last one were there."""

    def get() -> Any:
        began = time.perf_counter()

        def on_block(at: int, block: EncodedBlock) -> None:
            if at == COUNT - 1:
                lowest_s.append(time.perf_counter() - began)

        return store.get(sections=Sections(COUNT), on_block=on_block)

    return get
