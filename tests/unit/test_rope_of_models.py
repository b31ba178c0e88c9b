"""The rotation that a config names is the one that the model of `transformers` applies."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    FalconConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    SmolLM3Config,
)

from kvstore.layout import KVLayout

SIZES = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | {"num_key_value_heads": 1, "intermediate_size": 32, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS = {
    "halves": LlamaConfig(**GROUPED),
    "yarn": LlamaConfig(**GROUPED, rope_parameters=YARN),
    "partial": PhiConfig(**SIZES, intermediate_size=32),
    "partial by another word": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "neighbours": CohereConfig(**GROUPED),
    "partial neighbours": GPTJConfig(vocab_size=32, n_embd=48, n_layer=2, n_head=3, rotary_dim=8, bos_token_id=1, eos_token_id=2),
    "one head by another word": FalconConfig(**SIZES),
    "not in the first layer": SmolLM3Config(**GROUPED, no_rope_layers=[0, 1]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_tokens_have_equal_keys_in_the_first_layer_once_the_rotation_is_undone(config):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, cache = AutoModelForCausalLM.from_config(config).eval(), DynamicCache()
        argument = "cache" if "cache" in model.forward.__annotations__ else "past_key_values"
        model(torch.full((1, 50), 7), use_cache=True, **{argument: cache})
    keys = torch.cat([layer.keys for layer in cache.layers])
    layout = KVLayout.from_model_config(config)
    assert keys.shape == (layout.layers, layout.kv_heads, 50, layout.head_dim)
    unrotated = layout.rope.rotate(keys, torch.arange(50), inverse=True)[0]
    torch.testing.assert_close(unrotated, unrotated[:, :1].expand_as(unrotated), atol=1e-5, rtol=1e-4)
    if layout.rope.for_layer(0).rotary_dim:
        assert not torch.allclose(keys[0], keys[0, :, :1].expand_as(keys[0]), atol=1e-2 * float(keys[0].abs().max()))
    else:
        assert layout.rope.for_layer(1).rotary_dim
