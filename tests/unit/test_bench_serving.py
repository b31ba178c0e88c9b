"""The arithmetic of `bench serving`, `bench ttft` and the load test, on made-up calls."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace

import grpc
import pytest

from kvstore.errors import CapacityError
from services.bench import load, serving, ttft
from services.bench.base import Result
from services.bench.vllm_child import measure
from services.bench.workload import Answer, percentile, summary_ms
from services.engine.base import CacheReport, Delta, Timing
from services.worker.faults import describe


def test_a_percentile_is_a_value_that_was_measured():
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile(values, 1.0)) == (50, 95, 100)
    assert percentile([3.0], 0.95) == 3 and percentile([1.0, 2.0], 0.01) == 1
    assert summary_ms([0.1, 0.2, 0.3]) == {"median_ms": 200.0, "p95_ms": 300.0}


def test_decode_counts_from_the_moment_when_all_have_begun():
    quick, slow = Answer(0.0, [1.0, 2.0, 3.0, 4.0]), Answer(0.0, [2.0, 3.0, 4.0, 5.0])
    found = serving._of_answers([quick, slow], 4)
    assert found["decode_tokens_per_s"] == pytest.approx((2 + 3) / 3)
    assert found["tokens_per_s"] == pytest.approx(8 / 5) and found["ttft_s"] == 1.5 and found["latency_p95_s"] == 5


def test_without_vllm_it_says_so():
    assert "not installed" in measure("model", None, (1,), 8, 2, "float32")["absent"]
    assert "did not run" in measure("model", "/nonexistent", (1,), 8, 2, "float32")["absent"]


def made(cold: dict[int, float], warm: dict[int, float]) -> Result:
    result = Result("ttft", {"lengths_tokens": list(cold)})
    for length in cold:
        result.samples[f"cold.{length}.ttft_ms"] = [cold[length]]
        last = Delta("", [], "length", cache=CacheReport(length, bytes_fetched=10), timing=Timing(fetch_ms=1.0))
        ttft._note_warm(result, f"int8.local.{length}", Answer(0.0, [warm[length] / 1e3], last))
    result.samples |= {"mixed.cold.ttft_ms": [10.0, 100.0], "mixed.warm.ttft_ms": [5.0, 20.0]}
    result.samples |= {"stream.gap_ms": [1.0, 1.0, 6.0], "stream.gap_beside_prompts_ms": [2.0, 2.0, 6.0]}
    ttft._summarize(result, [SimpleNamespace(name="int8.local")])
    return result


@pytest.mark.parametrize(
    ("warm", "expected"),
    [({100: 5, 200: 5}, 100), ({100: 30, 200: 10}, 150), ({100: 30, 200: 50}, None)],
    ids=["from the first", "between", "never"],
)
def test_break_even_lies_between_the_lengths(warm, expected):
    result = made({100: 20.0, 200: 20.0}, warm)
    assert result.rows[-1]["break_even_tokens"] == (None if expected is None else pytest.approx(expected))
    assert result.ratios["int8.local.100.cold_to_warm"] == pytest.approx(20 / warm[100])
    assert result.ratios["mixed.p95_warm_to_cold"] == pytest.approx(0.2)
    assert result.ratios["stream.longest_gap_to_median"] == 3 and result.ratios["stream.longest_gap_to_median_of_all"] == 6
    assert "int8.local" in ttft.render(result) and ttft.plot(result).startswith("<svg") and json.dumps(result.samples)


class Refusal(grpc.RpcError):
    """As gRPC raises it for a full queue."""

    def code(self):
        return grpc.StatusCode.RESOURCE_EXHAUSTED

    def trailing_metadata(self):
        return (describe(CapacityError("full"), 3.0)[1].trailer(self.code()),)


class Stub:
    """Answers in 10 ms, `places` at a time."""

    def __init__(self, places: int) -> None:
        self.places = places

    async def Generate(self, request, timeout):
        if not self.places:
            raise Refusal
        self.places -= 1
        try:
            await asyncio.sleep(0.01)
        finally:
            self.places += 1


async def test_a_load_counts_answers_refusals_and_their_delays(monkeypatch):
    monkeypatch.setattr(load, "memory_bytes", lambda running: 1000)
    calls = load.Load(Stub(2), random.Random(0))
    assert await calls.closed_loop(2, 0.1) > 20
    await calls.open_loop(1000, 0.2, None)
    assert calls.codes["OK"] == len(calls.answered_s) and calls.in_flight == 0 and calls.most_in_flight >= 2
    assert calls.codes["RESOURCE_EXHAUSTED"] == len(calls.delays_s) > 0 and set(calls.delays_s) == {3.0}
    result = load._result(calls, 100.0, "tiny", 0.1)
    assert result.rows[0]["refusals_with_retry_delay"] == len(calls.refused_s) and "in flight" in load.render_load(result)


def test_growth_compares_the_last_third_with_the_middle():
    assert load._growth([9, 9, 1, 1, 2, 2]) == 2 and load._growth([1]) is None
