"""One simulated run: a cluster, its clients and its faults from a seed; then rest, and the question whether all is as promised."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

from . import chaos
from .cluster import Cluster
from .content import prompts
from .history import History
from .knobs import Knobs, draw
from .loop import StuckError, VirtualLoop
from .workload import Worker

#: Longer than any lease, pin, hold or timeout of a simulated node or client (4 s), after the longest that a message waits in a cut (6 s).
REST_S = 10.5
#: Sizes are small here, so that a block has several frames and a stream several messages.
SMALL = {
    "kvstore.node.handlers.get": {"FRAME_BYTES": 600, "PACK_BYTES": 1500},
    "kvstore.client.frames": {"FRAME_BYTES": 800, "PACK_BYTES": 1500},
}


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of one run: `trace` is a digest of every event, the same for the same seed."""

    seed: int
    knobs: Knobs
    trace: str
    seconds: float
    counts: Counter[str]
    violations: list[str]


def warm_up() -> None:
    """Once a process, before many runs: modules and blocks are here to stay, so the collector need not look at them after every seed."""
    prompts()
    gc.freeze()


def simulate(seed: int) -> Result:
    """Run `seed` from beginning to end."""
    knobs, loop = draw(seed), VirtualLoop()
    history = History(loop.time)
    with substitutes(), _errors_logged(history):
        main = loop.create_task(_live(Cluster(seed, knobs, loop, history)))
        try:
            loop.run_until_complete(main)
        except StuckError as error:
            history.violation(str(error))
        finally:
            loop.close()
    return Result(seed, knobs, history.trace, loop.time(), history.counts, history.violations)


async def _live(cluster: Cluster) -> None:
    for i in range(cluster.knobs.nodes):
        await cluster.start_node(f"node{i}")
    workers = [Worker(cluster, f"client{i}") for i in range(cluster.knobs.clients)]
    tasks = [asyncio.create_task(cluster.watch()), asyncio.create_task(chaos.reign(cluster))]
    await asyncio.gather(*(worker.work(cluster.knobs.busy_s) for worker in workers))
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    chaos.heal(cluster)
    cluster.network.calm()
    await asyncio.sleep(REST_S)
    tasks[0].cancel()
    await _at_rest(cluster, workers)


async def _at_rest(cluster: Cluster, workers: list[Worker]) -> None:
    """Nothing was leaked, the index knows all that is held, everything can be read, and at the end every page is free."""
    history = cluster.history
    for member in cluster.members.values():
        engine = member.node.engine
        cluster.inspect(member)
        left = {"leases": len(engine.holds.leases), "pins": len(engine.holds.pins), "reserved pages": engine.reserved_pages}
        if any(left.values()):
            history.violation(f"{member.host} at rest still has {left}")
        unknown = [e for e in engine.table if member.incarnation not in cluster.backend.state.holders.get(e.key, ())]
        if unknown:
            history.violation(f"the index does not know {len(unknown)} of {len(engine.table)} blocks of {member.host}")
    # A reading mends the rows of the index that lead it nowhere; behind each may be another, of the next holder.
    for again in (*(False for _ in cluster.members), True):
        for worker in workers:
            for prompt in prompts():
                hits, blocks = await worker.read_all(prompt)
                if again and blocks < hits and not history.flips and not cluster.knobs.spill:  # a read that promotes drops others
                    history.violation(f"at rest the index named {hits} blocks of a prompt, and {blocks} were there")
        await asyncio.sleep(1.0)
    for member in cluster.members.values():
        engine = member.node.engine
        engine.evict([entry.key for entry in engine.table])
        if engine.free_bytes != engine.arena_bytes:
            history.violation(f"{member.host} has {engine.arena_bytes - engine.free_bytes} bytes that nobody holds")
    if not history.flips and cluster.node_metrics.corrupt_blocks.labels("put")._value.get():
        history.violation("blocks looked corrupt to a node, though no bit was changed")


@contextmanager
def substitutes() -> Iterator[None]:
    """What takes the place of sockets, and of sizes made for large blocks."""
    with ExitStack() as stack:
        stack.enter_context(patch("kvstore.node.node.DoorServer", NoDoor))
        for module, values in SMALL.items():
            stack.enter_context(patch.multiple(import_module(module), **values))
        yield


class NoDoor:
    """A node's second entrance needs sockets and threads; here there is none, and clients call."""

    def __init__(self, service: Any) -> None:
        """Nothing is served."""

    async def start(self, config: Any) -> str:
        return ""

    async def stop(self) -> None:
        """Nothing is open."""

    def relax(self) -> None:
        """Nothing is held."""


class _Errors(logging.Handler):
    """What our code logs as an error it did not foresee: a violation."""

    def __init__(self, history: History) -> None:
        super().__init__(logging.ERROR)
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else ""
        self._history.violation(f"logged by {record.name}: {record.getMessage()} {cause!r}")


@contextmanager
def _errors_logged(history: History) -> Iterator[None]:
    logger, handler = logging.getLogger("kvstore"), _Errors(history)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

