"""The engine answers as plain transformers does, for models of several families."""

from __future__ import annotations

import asyncio

import pytest
from transformers import DeepseekV3Config, Gemma2Config, LlamaConfig

from kvstore.errors import ConfigError
from services.engine.base import CacheMode
from services.engine.config import EngineConfig
from services.engine.loading import load
from tests.engine_support import COMMON, FAMILIES, MemoryStore, answer, make_model, prompt, published, reference, running, spec


@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_answers_are_those_of_plain_transformers(family, tmp_path):
    path = make_model(family, tmp_path)
    prompts = [prompt(n, seed=n) for n in (1, 16, 57, 130)]
    want = [reference(path, p, 12) for p in prompts]
    store = MemoryStore()
    async with running(path, store, codec="raw") as engine:
        alone = [await answer(engine, spec(p, 12)) for p in prompts]
        assert [tokens for tokens, _ in alone] == want
        requests = [spec(p, 12, cache_mode=mode) for mode in (CacheMode.USE, CacheMode.BYPASS) for p in prompts]
        together = await asyncio.gather(*(answer(engine, request) for request in requests))
        assert [tokens for tokens, _ in together] == want * 2
        await published(engine, store, 3 + 8)
        again = [await answer(engine, spec(p, 12)) for p in prompts]
        assert [tokens for tokens, _ in again] == want
        assert [last.cache.cached_tokens for _, last in again] == [0, 0, 48, 128]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (DeepseekV3Config(**COMMON, kv_lora_rank=8), "latent attention"),
        (LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(config, says, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=says):
        load(EngineConfig(str(tmp_path)))


async def test_a_model_with_soft_capped_attention_is_refused_at_the_start(tmp_path):
    FAMILIES["gemma2"] = Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=16)
    try:
        make_model("gemma2", tmp_path)
    finally:
        del FAMILIES["gemma2"]
    with pytest.raises(ConfigError, match="softcap"):
        async with running(tmp_path):
            pass


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(EngineConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="causal language model"):
        load(EngineConfig(str(tmp_path)))
