"""Tiny random models of several families, and a store in memory, for the engine's tests."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from kvstore.block import EncodedBlock
from kvstore.client import ClientConfig, KvClient
from kvstore.metadata import IndexEntry, InprocMetadata
from services.engine.base import Delta, GenerateSpec, SamplingParams
from services.engine.config import EngineConfig
from services.engine.transformers_engine import TransformersEngine
from tests.client_support import NODES, LoopbackTransport

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
#: Family -> config. Head dim 8 but for Gemma; grouped, full and partial heads; full and sliding windows; rotation full and partial.
FAMILIES = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=3),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16),
    "mistral": MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=40),
    "phi": PhiConfig(**COMMON, num_key_value_heads=6),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "gemma3": Gemma3TextConfig(
        **COMMON, num_key_value_heads=2, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens 0 … 255, then begin, end and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(family: str, path: Path) -> Path:
    """A random model of `family`, saved with its tokenizer. Weights are large enough that answers are varied."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    torch.random.set_rng_state(generator)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def reference(path: Path, prompt: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """What plain transformers answers greedily, the end token ignored."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def prompt(length: int, seed: int = 0, vocabulary: int = 256) -> tuple[int, ...]:
    """Random token ids."""
    return tuple(torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def spec(tokens: tuple[int, ...], new: int = 8, **options) -> GenerateSpec:
    """A greedy request; `options` go to the sampling parameters or to the spec, whichever has them."""
    names = SamplingParams.__dataclass_fields__
    sampling = {k: options.pop(k) for k in list(options) if k in names}
    return GenerateSpec("r", tokens, SamplingParams(new, **{"ignore_eos": True, **sampling}), **options)


async def answer(engine: TransformersEngine, request: GenerateSpec) -> tuple[list[int], Delta]:
    """All tokens of an answer, and its last delta with the whole text."""
    deltas = [delta async for delta in engine.generate(request)]
    last = deltas[-1]
    last.text = "".join(d.text for d in deltas)
    return [t for d in deltas for t in d.tokens], last


class MemoryStore(LoopbackTransport):
    """A node in memory that announces what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata = InprocMetadata()
        self.client = KvClient(ClientConfig(), metadata=self.metadata, transport=self)

    async def put(self, address, frames, timeout_s):
        response = await super().put(address, frames, timeout_s)
        node = next(n for n in NODES if n.address == address)
        blocks = self.blocks(address)
        await self.metadata.announce(node.incarnation, [IndexEntry(b.header.key, b.header.total_bytes, b.header.present) for b in blocks])
        return response

    def blocks(self, address: str | None = None) -> list[EncodedBlock]:
        """What is stored, on one node or on all, by position."""
        places = [self.stored[address]] if address else list(self.stored.values())
        return sorted((EncodedBlock.from_bytes(b) for place in places for b in place.values()), key=lambda b: b.header.start)


@asynccontextmanager
async def running(path: Path, store: MemoryStore | None = None, **config):
    """A started engine on one thread; `store` is given two nodes first."""
    if store is not None:
        for node in NODES:
            await store.metadata.heartbeat(node, 600)
    config = {"dtype": "float32", "threads": 1, "block_tokens": 16, "max_batch": 4, "store_floor_s": 5.0, "always_fetch": True, **config}
    engine = TransformersEngine(EngineConfig(str(path), **config), store.client if store else None)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def published(engine: TransformersEngine, store: MemoryStore, count: int) -> None:
    """Wait until `count` blocks are stored."""
    async with asyncio.timeout(20):
        while len(store.blocks()) < count:
            await asyncio.sleep(0.01)
    assert await engine._client.flush(5)

