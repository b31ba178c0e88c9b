"""The default model: answers do not depend on batch, cutting, or what came from a `raw` store, token for token."""

from __future__ import annotations

import asyncio

import pytest

from services.engine.base import CacheMode
from services.model import resolve_model
from tests.engine_support import MemoryStore, answer, prompt, published, running, spec

#: Prompts of these lengths, of which all whole blocks are stored.
LENGTHS = {"auto": (70, 130, 260), "bfloat16": (65, 130)}


@pytest.mark.parametrize("dtype", LENGTHS)
async def test_greedy_answers_are_the_same_token_for_token(dtype):
    path = resolve_model("")
    prompts = [prompt(n, seed=n, vocabulary=49152) for n in LENGTHS[dtype]]
    store = MemoryStore()
    async with running(path, store, codec="raw", dtype=dtype, block_tokens=64, max_batch=len(prompts)) as engine:
        alone = [await answer(engine, spec(p, 6, cache_mode=CacheMode.BYPASS)) for p in prompts]
        batch = await asyncio.gather(*(answer(engine, spec(p, 6)) for p in prompts))
        await published(engine, store, sum(n // 64 for n in LENGTHS[dtype]))
        hits = await asyncio.gather(*(answer(engine, spec(p, 6)) for p in reversed(prompts)))
    want = [tokens for tokens, _ in alone]
    assert [tokens for tokens, _ in batch] == want
    assert [tokens for tokens, _ in reversed(hits)] == want
    assert [last.cache.cached_tokens for _, last in reversed(hits)] == [(n - 1) // 64 * 64 for n in LENGTHS[dtype]]
