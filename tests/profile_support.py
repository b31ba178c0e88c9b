"""A tiny model's profile, made in a moment from what the model itself computed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kvstore.codecs import KVSample, Profile
from kvstore.codecs.calibration import calibrate
from kvstore.layout import KVLayout
from services.calibrate.collect import embeddings, samples
from tests.engine_support import VOCABULARY, prompt


def random_sample(layout: KVLayout, tokens: int, seed: int) -> KVSample:
    """Random K and V, correlated over channels."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, layout.values_per_token, generator=torch.Generator().manual_seed(1))
    x = torch.randn(tokens, 8, generator=rng) @ mix + 0.1 * torch.randn(tokens, layout.values_per_token, generator=rng)
    keys, values = x.view(tokens, 2, layout.layers, layout.kv_heads, layout.head_dim).permute(1, 2, 3, 0, 4)
    keys = layout.rope.rotate(keys.contiguous(), torch.arange(tokens))
    return KVSample(keys.to(layout.dtype), values.contiguous().to(layout.dtype), 0, torch.randint(0, VOCABULARY, (tokens,), generator=rng))


@cache
def profile_of(layout: KVLayout, fingerprint: str, seed: int = 0) -> Profile:
    """Bad at compressing, good enough to encode and decode."""
    samples = [random_sample(layout, 64, 100 * seed + number) for number in range(4)]
    table = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(seed))
    return calibrate(layout, samples, table, facts={"model": fingerprint})


def fitted_profile(path: Path, layout: KVLayout, fingerprint: str) -> Profile:
    """One that knows the model in the directory `path`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    windows = [prompt(400, seed) for seed in range(8)]
    return calibrate(layout, samples(model, windows), embeddings(model), facts={"model": fingerprint})


def copying(source: Path, runs: Path) -> Callable[[str, Path], list[str]]:
    """A calibrator that copies `source`, and leaves a line in `runs` for each time it is run."""
    program = "import shutil, sys; open(sys.argv[3], 'a').write('run\\n'); shutil.copy(sys.argv[1], sys.argv[2])"
    return lambda model, out: [sys.executable, "-c", program, str(source), str(out), str(runs)]


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait for a condition that another task brings about; TimeoutError if it never comes."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)
