"""``python -m tests.fault.client_process REDIS_URL put|get|pressure NAME``: a client that works until it is killed."""

from __future__ import annotations

import asyncio
import sys

from kvstore.client import ClientConfig, KvClient

from .blocks import NAMESPACE, chain


async def work(redis_url: str, does: str, name: int) -> None:
    client = KvClient(ClientConfig(redis_url=redis_url))
    await client.start()
    count = {"put": 12, "get": 8, "pressure": 48}[does]
    blocks = chain(name, count, 150_000)
    client.publish(blocks)
    if does == "get":
        await client.flush(3)
    print("working", flush=True)
    while True:
        if does == "get":
            hits = await client.lookup([block.header.key for block in blocks])
            await client.fetch(hits, namespace=NAMESPACE, deadline_s=1.0)
        else:
            name += 1
            client.publish(chain(name, count, 150_000))
            await client.flush(1)
        await asyncio.sleep(0)


asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
