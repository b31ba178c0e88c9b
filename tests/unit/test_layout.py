"""Layout and rotation agree with what `transformers` computes, for every kind of RoPE that is named as supported."""

import pytest
import torch
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PhiConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_neox
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvstore.errors import InvalidInputError
from kvstore.layout import KVLayout
from kvstore.rope import RopeSpec

SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 1024},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotation_equals_llama(kind):
    config = LlamaConfig(**SMALL, rope_parameters=SCALINGS[kind], max_position_embeddings=2048)
    rope = KVLayout.from_model_config(config).rope
    if kind != "default":
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        torch.testing.assert_close(torch.tensor(rope.inv_freq), inv_freq)
        assert rope.scale == pytest.approx(scale)
    keys, positions = torch.randn(2, 4, 50, 64), torch.arange(1000, 1050)
    cos, sin = LlamaRotaryEmbedding(config)(keys, positions[None])
    expected, _ = apply_rotary_pos_emb(keys[:1], keys[:1], cos, sin)
    torch.testing.assert_close(rope.rotate(keys[:1], positions), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(rope.rotate(rope.rotate(keys, positions), positions, inverse=True), keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [PhiConfig(**SMALL), GPTNeoXConfig(**SMALL)], ids=["phi", "gpt_neox"])
def test_partial_rotation_leaves_the_rest(config):
    rope = KVLayout.from_model_config(config).rope
    keys, positions = torch.randn(1, 4, 9, 64), torch.arange(9)
    rotated = rope.rotate(keys, positions)
    assert 0 < rope.rotary_dim < 64
    assert torch.equal(rotated[..., rope.rotary_dim :], keys[..., rope.rotary_dim :])
    if isinstance(config, GPTNeoXConfig):
        cos, sin = GPTNeoXRotaryEmbedding(config)(keys, positions[None])
        torch.testing.assert_close(rotated, apply_neox(keys, keys, cos, sin)[0], atol=1e-5, rtol=1e-5)


def test_one_rotation_a_layer():
    layout = KVLayout.from_model_config(Gemma3TextConfig(**SMALL | {"num_hidden_layers": 7}, num_key_value_heads=2, head_dim=64))
    keys, positions = torch.randn(7, 2, 5, 64), torch.arange(90, 95)
    rotated = layout.rope.rotate(keys, positions)
    for layer in range(7):
        assert torch.equal(rotated[layer], layout.rope.for_layer(layer).rotate(keys[layer], positions))
    assert not torch.allclose(layout.rope.for_layer(0).rotate(keys[0], positions), layout.rope.for_layer(5).rotate(keys[0], positions))
    torch.testing.assert_close(layout.rope.rotate(rotated, positions, inverse=True), keys, atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidInputError):
        layout.rope.rotate(keys[:3], positions)


def test_interleaved_pairs():
    rope = RopeSpec((1.0, 0.1), interleaved=True)
    keys = torch.randn(3, 4)
    rotated = rope.rotate(keys, torch.tensor([0, 1, 2]))
    assert torch.equal(rotated[0], keys[0])
    torch.testing.assert_close(rotated.norm(dim=-1), keys.norm(dim=-1))


def test_sizes():
    layout = KVLayout(30, 3, 64)
    assert layout.bytes_per_token == 23040 and layout.raw_bytes(64) == 64 * 23040
    assert KVLayout(30, 3, 64, torch.float32).raw_bytes(64) == 64 * 23040, "ratios count 2 bytes a value whatever the dtype"


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"kv_heads": -1}, {"head_dim": 2.5}, {"dtype": torch.int8}])
def test_impossible_layouts(wrong):
    with pytest.raises(InvalidInputError):
        KVLayout(**{"layers": 2, "kv_heads": 1, "head_dim": 8} | wrong)


def test_models_without_per_head_kv_are_refused_by_name():
    config = LlamaConfig(**SMALL)
    config.kv_lora_rank = 512
    with pytest.raises(InvalidInputError, match="latent"):
        KVLayout.from_model_config(config)
