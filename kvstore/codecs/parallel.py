"""Blocks over threads. Native loops release the GIL, so a plain pool serves; numba's own thread layers are not all re-entrant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="codecs")


def spread(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(i) for i in items]`` over as many threads as torch uses. The results do not depend on how many."""
    work = list(items)
    threads = min(torch.get_num_threads(), len(work))
    return [function(i) for i in work] if threads <= 1 else list(_pool(torch.get_num_threads()).map(function, work))


def begin(function: Callable[[Item], Result], items: Iterable[Item]) -> Callable[[], list[Result]]:
    """As `spread`, for items that come one after the other: each is begun as it comes, and what this returns waits for the results."""
    threads = torch.get_num_threads()
    if threads <= 1:
        results = [function(i) for i in items]
        return lambda: results
    futures = [_pool(threads).submit(function, i) for i in items]
    return lambda: [future.result() for future in futures]
