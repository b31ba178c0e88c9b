"""Who is in a running system, by its own membership in Redis."""

from __future__ import annotations

import asyncio
from typing import Any

from kvstore.metadata import NodeRecord, WorkerRecord, connect

NODE_FIELDS = ("id", "address", "metrics", "pid", "incarnation", "device", "arena_bytes", "used_bytes", "blocks")
WORKER_FIELDS = ("id", "metrics", "pid", "engine", "device")


def members(redis: str) -> tuple[list[NodeRecord], list[WorkerRecord]]:
    """Living nodes and workers. Raises TransportError or DeadlineError where Redis does not answer."""

    async def ask() -> tuple[list[NodeRecord], list[WorkerRecord]]:
        metadata = connect(redis, timeout_s=3.0)
        try:
            return await metadata.nodes(), await metadata.workers()
        finally:
            await metadata.close()

    return asyncio.run(ask())


def rows(records: list, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The named fields of each record."""
    return [{name: getattr(record, name) for name in names} for record in records]
