"""The engine on a GPU: answers do not depend on batch, cutting, or what came from a `raw` store, token for token."""

from __future__ import annotations

import asyncio

import pytest
import torch

from services.engine.base import CacheMode
from tests.engine_support import FAMILIES, MemoryStore, answer, make_model, prompt, published, reference, running, spec

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
