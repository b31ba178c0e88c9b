"""``python -m tests.fault.soak``: hours in minutes. Load and random kills, and at every idle moment the question what was left behind.

Node-0 lives from beginning to end, so that what it leaks shows; everything else may be killed, stopped or emptied at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .base import Outcome
from .load import Load
from .run import healthy
from .system import System
from .wire_faults import Client

STEADY = "node-0"
PERIOD_S, WARM_UP = 12.0, 0.25
#: Resident memory may differ so much between idle moments, and descriptors by so many: connections come and go.
RSS_SPREAD, SPARE_FILES = 0.02, 8
#: After the last call; a node tidies up when nothing has changed for a second.
IDLE_S = 2.0
WAYS = ("grpc", "tcp", "local")


@dataclass(slots=True)
class Record:
    """What was seen at the idle moments."""

    outcome: Outcome = field(default_factory=Outcome)
    kills: int = 0
    idle_moments: int = 0
    unequal_accounts: int = 0
    leaked_leases: int = 0
    leaked_pins: int = 0
    leaked_bytes: int = 0
    ended_by_themselves: int = 0
    rss_bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def summary(self, minutes: float) -> dict:
        """One JSON object; `ok` says whether all is as promised."""
        warm = int(len(self.rss_bytes) * WARM_UP)
        rss, files = self.rss_bytes[warm:], self.files[warm:]
        spread = (max(rss) - min(rss)) / max(rss) if rss else 0.0
        first, second = rss[: len(rss) // 2], rss[len(rss) // 2 :]  # a leak shows in both; guests that come and go in the spread alone
        growth = statistics.median(second) / statistics.median(first) - 1 if first else 0.0
        grown = files[-1] - files[0] if files else 0
        bad = self.unequal_accounts + self.leaked_leases + self.leaked_pins + self.leaked_bytes + self.ended_by_themselves
        return {
            "ok": not (bad or self.outcome.bad) and spread <= RSS_SPREAD and grown <= SPARE_FILES,
            "minutes": round(minutes, 1), "kills": self.kills, "idle_moments": self.idle_moments, "blocks_served": self.outcome.served,
            "blocks_missed": self.outcome.missed, "wrong": self.outcome.wrong, "hangs": self.outcome.hangs,
            "lost_pins": self.outcome.lost_pins, "unhealthy": self.outcome.unhealthy, "unequal_accounts": self.unequal_accounts,
            "leaked_leases": self.leaked_leases, "leaked_pins": self.leaked_pins, "leaked_reserved_bytes": self.leaked_bytes,
            "nodes_ended_by_themselves": self.ended_by_themselves, "rss_growth": round(growth, 4), "rss_spread": round(spread, 4),
            "rss_bytes": self.rss_bytes, "open_files": self.files, "notes": dict(self.outcome.notes),
        }  # fmt: skip


async def soak(directory: Path, minutes: float, bar: Progress) -> dict:
    """Run for so long; returns the summary."""
    system, record, began = System(directory, nodes=3), Record(), time.monotonic()
    system.node_options = ("--metrics", "127.0.0.1:0")
    await system.start()
    task = bar.add_task("soaking", total=minutes * 60)
    try:
        while (passed := time.monotonic() - began) < minutes * 60:
            bar.update(task, completed=passed)
            system.way = WAYS[record.idle_moments % len(WAYS)]
            load = Load(system, record.outcome)
            await _period(system, load, record)
            if await healthy(system, load, "idle"):
                await load.check_pins()
            await asyncio.sleep(IDLE_S)
            await _inspect(system, record)
    finally:
        await system.stop()
    return record.summary((time.monotonic() - began) / 60)


async def _period(system: System, load: Load, record: Record) -> None:
    """Load, pins and a few kills."""
    for _ in range(4):
        await load.write(12)
    await load.pin(load.prompts[-1][:3], 60)
    load.start(random.choice(("mixed", "pressure", "put")))
    ends = time.monotonic() + PERIOD_S
    while time.monotonic() < ends:
        await asyncio.sleep(random.uniform(1.0, 4.0))
        await random.choice((_kill_node, _kill_client, _stop_node, _lose_redis))(system, load)
        record.kills += 1
    await load.stop()


async def _kill_node(system: System, load: Load) -> None:
    name = random.choice([name for name in system.nodes if name != STEADY])
    dead = await system.kill_node(name)
    load.pins = {key: holder for key, holder in load.pins.items() if holder != dead.incarnation}
    await system.start_node(name)


async def _kill_client(system: System, load: Load) -> None:
    fault = Client(random.choice(("put", "get", "pressure")), signal.SIGKILL)
    await fault.inject(system)
    await fault.heal(system)


async def _stop_node(system: System, load: Load) -> None:
    node = system.nodes[random.choice(list(system.nodes))]
    node.signal(signal.SIGSTOP)
    await asyncio.sleep(random.uniform(0.1, 1.0))
    node.signal(signal.SIGCONT)


async def _lose_redis(system: System, load: Load) -> None:
    system.redis.process.kill()
    system.redis.process.wait()
    await asyncio.sleep(random.uniform(0.0, 0.5))
    system.redis = await asyncio.to_thread(system.new_valkey, system.redis.port)


async def _inspect(system: System, record: Record) -> None:
    """Everything is quiet: what is still held, and does every account agree?"""
    record.idle_moments += 1
    pid = system.nodes[STEADY].pid
    record.rss_bytes.append(_rss_bytes(pid))  # before anything is asked: what an answer takes is given back at the next idle moment
    record.files.append(len(os.listdir(f"/proc/{pid}/fd")))
    for node in system.client.nodes():
        own = next((p for p in system.nodes.values() if p.incarnation == node.incarnation), None)
        if own is None:
            continue
        stats = await system.account(node)
        page = await asyncio.to_thread(_read, f"http://{node.metrics}/metrics")
        exported = {state: int(float(value)) for state, value in re.findall(r'concertina_arena_bytes{.*state="(\w+)"} (\S+)', page)}
        allocated = {"used": stats.used_bytes, "free": stats.free_bytes, "reserved": stats.reserved_bytes}
        record.unequal_accounts += exported != allocated or sum(allocated.values()) != stats.arena_bytes
        record.leaked_leases += stats.leases
        record.leaked_pins += stats.pinned
        record.leaked_bytes += stats.reserved_bytes
    record.ended_by_themselves += sum(node.process.returncode is not None for node in system.nodes.values())


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as page:
        return page.read().decode()


def main() -> int:
    """Exit status 1 if anything was left behind, lost, wrong or late."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.soak", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=15, help="how long (default 15)")
    args = parser.parse_args()
    logging.getLogger("kvstore").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="concertina-soak-") as directory, Progress(console=Console(stderr=True)) as bar:
        summary = asyncio.run(soak(Path(directory), args.minutes, bar))
    print(json.dumps(summary))
    return int(not summary["ok"])


if __name__ == "__main__":
    sys.exit(main())
