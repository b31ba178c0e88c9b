"""A whole cluster on virtual time: some seeds of every test run, and all that ever failed. `make sim` runs thousands."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sim import knobs
from tests.sim.cluster import Cluster
from tests.sim.content import prompts
from tests.sim.history import History
from tests.sim.knobs import draw
from tests.sim.loop import StuckError, VirtualLoop
from tests.sim.seeds import remembered
from tests.sim.workload import Worker
from tests.sim.world import simulate, substitutes

ROOT = Path(__file__).parents[2]
CALM = replace(draw(1), nodes=2, clients=1, pages=96, policy="lru", spike=0.0, reset=0.0, duplicate=0.0, flip=0.0, latency_s=0.001)


@pytest.mark.parametrize("seed", sorted({*range(1, 31), *remembered()}))
def test_nothing_that_must_never_happen_happens(seed: int) -> None:
    result = simulate(seed)
    assert not result.violations, f"replay with: make sim N=1 SEED={seed}"


def test_the_same_seed_replays_to_the_same_trace_in_another_process_and_another_seed_does_not() -> None:
    program = "from tests.sim.world import simulate, substitutes; print(simulate(5).trace)"
    command = [sys.executable, "-c", program]
    traces = {subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True).stdout for s in "12"}
    assert traces == {simulate(5).trace + "\n"}
    assert simulate(6).trace != simulate(5).trace


def test_the_runs_are_worth_something() -> None:
    """Over some seeds every kind of fault comes, blocks are served, and pins, leases and evictions happen."""
    counts = sum((simulate(seed).counts for seed in range(1, 9)), start=simulate(31).counts)
    assert counts["fault"] > 30
    assert counts["blocks served"] > 300
    assert all(counts[rpc] > 5 for rpc in ("Get", "Put", "Pin", "Unpin", "Lookup", "Release", "Evict"))


def test_many_seeds_run_by_command_on_two_cores() -> None:
    command = [sys.executable, "-m", "tests.sim", "--n", "4", "--seed", "1", "--jobs", "2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    summary = json.loads(done.stdout)
    assert (summary["seeds"], summary["violations"]) == (4, 0)
    assert summary["events"] > 100


def test_a_program_that_waits_for_nothing_is_found_at_once() -> None:
    loop = VirtualLoop()
    with pytest.raises(StuckError, match="nothing is scheduled"):
        loop.run_until_complete(loop.create_future())
    loop.close()


def calm_cluster(story) -> None:
    """Run `story(cluster, worker)` on two nodes and a client with nothing going wrong by itself."""
    loop = VirtualLoop()
    history = History(loop.time)
    cluster = Cluster(1, CALM, loop, history)

    async def live() -> None:
        for place in ("node0", "node1"):
            await cluster.start_node(place)
        worker = Worker(cluster, "client0")
        await worker.start()
        for prompt in prompts():
            for block in prompt.encodings[0]:
                history.wrote(block)
            worker.client.publish(prompt.encodings[0])
        await worker.client.flush()
        await asyncio.sleep(0.1)
        await story(cluster, worker)

    with substitutes():
        loop.run_until_complete(loop.create_task(live()))
        loop.close()
    assert not history.violations


@pytest.mark.parametrize("moment_s", [0.0, 0.13, 0.26, 0.39, 0.49])
def test_a_dead_node_is_noticed_within_three_seconds_and_costs_no_deadline_until_then(moment_s: float) -> None:
    async def story(cluster: Cluster, worker: Worker) -> None:
        await asyncio.sleep(moment_s)
        died, incarnation = cluster.loop.time(), cluster.members["node0"].incarnation
        cluster.crash("node0")
        while any(node.incarnation == incarnation for node in worker.client.nodes()):
            assert cluster.loop.time() - died <= 3.0
            for prompt in prompts():  # each of these is judged against its deadline
                hits = await worker.client.lookup(prompt.keys)
                await worker._fetch(prompt, hits, prompt.namespace, 0.0, 0.05)
            await asyncio.sleep(0.05)
        assert cluster.loop.time() - died <= 3.0

    calm_cluster(story)


def test_every_policy_is_drawn() -> None:
    assert {draw(seed).policy for seed in range(200)} == {name for name in knobs.names() if name != "opt"}
