"""The engine on a GPU: answers do not depend on batch, cutting, or what came from a `raw` store, token for token."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
import torch

from services.engine.base import CacheMode
from tests.engine_support import FAMILIES, MemoryStore, answer, make_model, prompt, published, reference, running, spec
from tests.unit.test_engine_cuda_kernels import ALONE, NORMS, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]
LENGTHS = (17, 40, 90, 130)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_answers_are_the_same_token_for_token(family, dtype, tmp_path):
    path, store = make_model(family, tmp_path), MemoryStore()
    prompts = [prompt(n, seed=n) for n in LENGTHS]
    async with running(path, store, device="cuda", codec="raw", dtype=dtype, max_batch=len(prompts)) as engine:
        alone = [await answer(engine, spec(p, 8, cache_mode=CacheMode.BYPASS)) for p in prompts]
        batch = await asyncio.gather(*(answer(engine, spec(p, 8)) for p in prompts))
        await published(engine, store, sum(n // 16 for n in LENGTHS))
        hits = await asyncio.gather(*(answer(engine, spec(p, 8)) for p in reversed(prompts)))
    want = [tokens for tokens, _ in alone]
    assert [tokens for tokens, _ in batch] == want
    assert [tokens for tokens, _ in reversed(hits)] == want
    assert [last.cache.cached_tokens for _, last in reversed(hits)] == [(n - 1) // 16 * 16 for n in LENGTHS]
    if dtype == "float32":
        assert want == [reference(path, p, 8) for p in prompts]


#: Products of 16-bit numbers by tensor cores, heads of other sizes than powers of two, and parts of keys.
KERNELS = """
for dtype in (torch.bfloat16, torch.float32):
    check(False, 256, [(0, 128, 64), (64, 0, 64), (128, 192, 7)], 3, 9, 64, 64, dtype)
    check(True, 8, [(0, 1300, 1), (1, 511, 1), (2, 512, 1), (3, 70, 1)], 3, 9, 64, 64, dtype, pages=32)
check(False, 256, [(0, 128, 64), (64, 448, 64)], 2, 32, 80, 64, torch.bfloat16, window=100)
check(True, 8, [(0, 1300, 1), (1, 511, 1)], 2, 32, 80, 64, torch.bfloat16, window=600, pages=32)
"""


@pytest.mark.parametrize("program", [KERNELS, ALONE, NORMS], ids=["attend", "alone", "norms"])
def test_kernels_do_as_torch_does(program):
    run(program, "cuda")


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gpt_neox", "float32"), ("gemma3", "float16")])
async def test_replayed_steps_answer_as_launched_ones(family, dtype, tmp_path, caplog):
    path, prompts = make_model(family, tmp_path), [prompt(n, seed=n) for n in LENGTHS]
    answers = []
    for graphs in (True, False):
        with caplog.at_level(logging.WARNING, "services.engine.cuda"):
            async with running(path, device="cuda", dtype=dtype, max_batch=3, cuda_graphs=graphs) as engine:
                assert engine._runner.replays is graphs, caplog.text
                answers.append([await answer(engine, spec(p, 12)) for p in prompts])
                answers.append(await asyncio.gather(*(answer(engine, spec(p, 12)) for p in prompts)))
    tokens = [[tokens for tokens, _ in some] for some in answers]
    assert tokens == [tokens[0]] * 4


async def test_without_kernels_steps_are_padded_just_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("services.engine.cuda.can_attend", lambda pool: False)
    path, prompts = make_model("mistral", tmp_path), [prompt(n, seed=n) for n in LENGTHS]
    async with running(path, device="cuda", max_batch=4) as engine:
        assert engine._runner.forwards is None and engine._runner.shapes.prefill > 16
        found = await asyncio.gather(*(answer(engine, spec(p, 8)) for p in prompts))
    assert [tokens for tokens, _ in found] == [reference(path, p, 8) for p in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_long_prompts_and_caches(family, tmp_path):
    """More parts of keys than one, and tables of more than one size."""
    path, store = make_model(family, tmp_path), MemoryStore()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    prompts = [prompt(n, seed=n) for n in (600, 1300, 4090, 70)]
    async with running(path, store, device="cuda", codec="raw", block_tokens=64) as engine:
        alone = [await answer(engine, spec(p, 16, cache_mode=CacheMode.BYPASS)) for p in prompts]
        batch = await asyncio.gather(*(answer(engine, spec(p, 16)) for p in prompts))
        await published(engine, store, sum(len(p) // 64 for p in prompts))
        hits = await asyncio.gather(*(answer(engine, spec(p, 16)) for p in prompts))
    want = [tokens for tokens, _ in alone]
    assert [tokens for tokens, _ in batch] == want and [tokens for tokens, _ in hits] == want
    assert all(last.cache.cached_tokens for _, last in hits)
    assert want == [reference(path, p, 16) for p in prompts]


async def test_who_gives_way_goes_on_as_if_nothing_had_happened(tmp_path):
    path, prompts = make_model("qwen2", tmp_path), [prompt(30, seed=s) for s in range(3)]
    async with running(path, device="cuda", dtype="bfloat16") as engine:
        want = [(await answer(engine, spec(p, 30)))[0] for p in prompts]
    async with running(path, device="cuda", dtype="bfloat16", max_live_tokens=96) as engine:
        found = await asyncio.gather(*(answer(engine, spec(p, 30)) for p in prompts))
        assert engine._runner.pool.pages.free == 6 and engine._runner.pool.pages.check()
    assert [tokens for tokens, _ in found] == want


@pytest.mark.parametrize("press", ["sliding_window", "h2o", "snapkv", "tova", "knorm"])
async def test_presses_bound_the_cache(press, tmp_path):
    path = make_model("llama", tmp_path)
    async with running(path, device="cuda") as engine:
        whole, _ = await answer(engine, spec(prompt(100), 12))
        exact, _ = await answer(engine, spec(prompt(100), 12, press=press, kv_tokens=112))
        pressed, last = await answer(engine, spec(prompt(100), 12, press=press, kv_tokens=48))
    assert exact == whole
    assert len(pressed) == 12 and last.finish_reason == "length"


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "svd"])
async def test_a_lossy_store_serves_hits(codec, tmp_path):
    path, store, asked = make_model("llama", tmp_path), MemoryStore(), prompt(90)
    async with running(path, store, device="cuda", codec=codec) as engine:
        await answer(engine, spec(asked, 4))
        await published(engine, store, 5)
        tokens, last = await answer(engine, spec(asked, 4))
    assert len(tokens) == 4 and last.cache.cached_tokens == 80
