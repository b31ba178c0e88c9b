"""The eviction benchmark's workloads and its rendering; that live nodes agree with the replay is tested with real ones."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from kvstore.block import EncodedBlock
from kvstore.eviction.trace import BLOCK_TOKENS, Trace
from services.bench import eviction
from services.bench.base import Result
from services.bench.live import Maker, Shape


def test_the_first_minutes_are_whole_blocks_at_a_faster_pace() -> None:
    trace = Trace.of("t", [(10.0, 700, ["a", "b"]), (40.0, 1024, ["a", "c"]), (100.0, 512, ["d"])])
    part = eviction.first_minutes(trace, 1.0, 6.0)
    assert [(r.now, r.input_tokens, list(r.blocks)) for r in part.requests] == [(0.0, 512, [0]), (5.0, 1024, [0, 1])]
    assert not any(part.partial)


def test_late_requests_are_the_same_in_the_same_order() -> None:
    trace = eviction.sessions(2.0)
    again = eviction.late(trace, 1)
    assert [(r.input_tokens, list(r.blocks)) for r in again.requests] == [(r.input_tokens, list(r.blocks)) for r in trace.requests]
    assert all(0.0 <= one.now - other.now <= 0.01 for one, other in zip(again.requests, trace.requests, strict=True))
    assert again.requests == eviction.late(trace, 1).requests != eviction.late(trace, 2).requests


def test_sessions_are_the_same_for_the_same_seed_and_come_back() -> None:
    trace = eviction.sessions(2.0)
    assert trace.requests == eviction.sessions(2.0).requests
    assert trace.references > 1.5 * trace.distinct_blocks
    assert all(request.input_tokens == len(request.blocks) * BLOCK_TOKENS for request in trace.requests)


def test_made_up_blocks_certify_themselves_and_chain() -> None:
    maker = Maker("x", Shape((512, 512, 1024), (0.02, 0.005, 0.001)))
    parent, child = maker.block(3), maker.block(4, 3, 1)
    again = EncodedBlock.from_bytes(child.to_bytes())
    assert again.header.parent == parent.header.key
    assert again.fidelities == (1, 2, 3)
    assert [row.size_bytes for row in again.header.rows] == [512, 512, 1024]


def test_the_table_and_the_plot_are_made_from_the_result_alone() -> None:
    cliff = {"part": "cliff", "store": "raw", "quality_weighted_hit_rate": 0.5}
    rows = [
        {"part": "agreement", "live_hit_rate": 0.2138, "replay_hit_rate": 0.2224},
        cliff | {"working_set_to_memory": 0.5, "hit_rate": 1.0},
        cliff | {"working_set_to_memory": 8.0, "hit_rate": 0.0},
        {"part": "put", "evicting_p99_ms": 2.0, "roomy_p99_ms": 1.0, "p99_ratio": 2.0},
    ]
    result = Result("eviction", {"trace": "sessions"}, rows=rows)
    assert "live 21.38 %, replay 22.24 %" in eviction.render(result)
    assert ET.fromstring(eviction.plot(result)).tag.endswith("svg")


def test_times_are_summed_up_by_percentile() -> None:
    row = eviction._put_row({"put.evicting_s": [0.002] * 99 + [0.02], "put.roomy_s": [0.001] * 100})
    assert row["p99_ratio"] == pytest.approx(2.0)
