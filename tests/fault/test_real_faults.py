"""Some faults once, on real processes. `make fault` makes every one of the table twenty times."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict

import pytest

from tests.fault.base import Fault
from tests.fault.faults import FAULTS
from tests.fault.load import SLACK_S
from tests.fault.run import repeat
from tests.fault.system import System

#: Quick ones, of each part of the system and each way to break it.
QUICK = [
    "node killed in put", "node stopped in get", "node out of file descriptors", "node impersonated", "bits flip in the arena",
    "arena full", "arena full of pins", "redis flushed", "redis cuts its clients", "redis failover to an empty one",
    "redis answers with flipped bits", "wire cut in get", "wire half-open", "a path that is no text", "bits flip on the wire in put",
    "corrupt put", "client killed in put", "bits flip in shared memory", "bits flip in a writer's shared memory", "door cut in get",
    "guest of the door stands still in put",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, "kvstore")


async def test_faults_cost_hits_and_nothing_else(tmp_path):
    system = System(tmp_path)
    await system.start()
    try:
        for name in QUICK:
            outcome = await repeat(system, FAULTS[name], 1)
            assert not outcome.bad, f"{name}: {asdict(outcome)}"
            assert outcome.served, f"{name}: nothing was read, so nothing was proved"
    finally:
        await system.stop()


async def test_faults_of_the_disk_behind_an_arena_cost_hits_and_nothing_else(tmp_path):
    system = System(tmp_path, spill=True)
    await system.start()
    try:
        for name in ("bits flip in the spill", "spill full", "node killed while it spills"):
            outcome = await repeat(system, FAULTS[name], 1)
            assert not outcome.bad, f"{name}: {asdict(outcome)}"
    finally:
        await system.stop()


async def test_a_killed_node_is_known_dead_within_three_seconds(tmp_path):
    system = System(tmp_path)
    await system.start()
    try:
        victim = await system.kill_node("node-0")
        began = time.monotonic()
        async with asyncio.timeout(3.0 + SLACK_S):
            while victim.incarnation in {record.incarnation for record in system.client.nodes()}:
                await asyncio.sleep(0.01)
        print(f"known after {time.monotonic() - began:.2f} s")
    finally:
        await system.stop()


def test_there_are_at_least_thirty_kinds_and_each_says_what_it_does():
    assert len(FAULTS) >= 30
    assert set(QUICK) <= set(FAULTS)
    for name, fault in FAULTS.items():
        assert isinstance(fault, Fault), name
        assert type(fault).__doc__, name
