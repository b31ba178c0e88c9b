"""`bench serving` in this process on a tiny model: both contestants run, and every ratio has its two sides."""

from __future__ import annotations

import math

from services.bench import serving
from services.bench.base import Result
from tests.engine_support import make_model


async def test_engine_and_plain_model_take_turns(tmp_path):
    result = Result("serving", {"vllm": "absent"})
    await serving._in_process(result, make_model("llama", tmp_path), (1, 2), new=4, rounds=2, long=128, calls=2)
    assert {(row["who"], row["requests"]) for row in result.rows} == {("engine", 1), ("engine", 2), ("plain", 1), ("plain", 2)}
    assert all(len(values) == (2 * serving.LONG_PROMPTS if "prefill" in name else 2) for name, values in result.samples.items())
    assert all(math.isfinite(value) and value > 0 for value in result.ratios.values())
    assert "engine_to_plain.prefill_128" in result.ratios and "plain" in serving.render(result)
    assert serving.plot(result).startswith("<svg")
