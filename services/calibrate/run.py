"""From a model's directory to its profile: the whole of ``concertina calibrate``, callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvstore.codecs import KVSample, Profile
from kvstore.codecs.calibration import calibrate
from kvstore.codecs.transform.groups import plan
from kvstore.errors import ConfigError
from kvstore.layout import KVLayout
from services.model.directory import fingerprint

from . import collect, texts

#: Share of the mix that files given by the user make up; the rest keeps a profile fit for what they do not cover.
GIVEN_SHARE = 0.75
#: Fewest tokens that can tell a basis from noise.
MIN_TOKENS = 4 * collect.WINDOW

Report = Callable[[int, int], None]


def calibrate_model(
    model_dir: Path,
    paths: Sequence[str] = (),
    *,
    tokens: int = 50_000,
    groups: int | str = "auto",
    device: str = "cpu",
    report: Report = lambda done, total: None,
) -> Profile:
    """Learn the profile of the model in `model_dir`.

    Parameters
    ----------
    paths : sequence of str
        Files and directories of text; empty for text that every machine has.
    tokens : int
        How many to run through the model.
    report : callable
        Told ``(windows done, windows in all)``.

    Raises
    ------
    ConfigError
        For too few tokens, an impossible number of groups, or texts that are missing or too short.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if tokens < MIN_TOKENS:
        raise ConfigError(f"calibration takes at least {MIN_TOKENS} tokens, not {tokens}")
    config = AutoConfig.from_pretrained(model_dir)
    layout, size = KVLayout.from_model_config(config, dtype=torch.float32), collect.window(config)
    plan(layout, groups)  # whatever cannot be is said before minutes are spent
    given = texts.read(paths) if paths else []
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval().requires_grad_(False).to(device)
    windows = _windows(tokenizer, given, tokens // size, size)

    def counted() -> Iterator[KVSample]:
        for done, sample in enumerate(collect.samples(model, windows)):
            report(done, len(windows))
            yield sample
        report(len(windows), len(windows))

    facts = {"model": fingerprint(model_dir), "texts": "given" if paths else "everywhere"}
    return calibrate(layout, counted(), collect.embeddings(model), groups=groups, continued=collect.continued(size), facts=facts)


def _windows(tokenizer: Any, given: list[str], count: int, size: int) -> list[list[int]]:
    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    kinds = texts.everywhere()
    if given:
        total = sum(share for share, _ in kinds)
        kinds = [(GIVEN_SHARE, given), *((share / total * (1 - GIVEN_SHARE), documents) for share, documents in kinds)]
    return texts.windows(kinds, count, size, tokenize)
