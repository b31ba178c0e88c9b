"""Calibration: what it learns from samples of a known distribution, and from a small real causal LM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.codecs import KVSample, calibrate, create
from kvstore.codecs.transform import fit
from kvstore.codecs.transform.groups import gather, plan, split
from kvstore.codecs.transform.ladder import Ladder
from kvstore.codecs.transform.moments import Moments, rows_of
from kvstore.codecs.transform.rate import budget_bytes, cheapest_within
from kvstore.errors import ConfigError, InvalidInputError, LayoutMismatchError
from kvstore.layout import KVLayout, RopeSpec

LAYOUT = KVLayout(3, 2, 8, torch.float32, RopeSpec((1.0, 0.3, 0.1)))


def sample(seed: int, tokens: int = 60, start: int = 0) -> KVSample:
    rng = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.layers, LAYOUT.kv_heads, tokens, LAYOUT.head_dim)
    k, v, gk, gv = (torch.randn(shape, generator=rng) for _ in range(4))
    return KVSample(k + 1, v, start, torch.randint(0, 9, (tokens,), generator=rng), gk, 3 * gv)


def test_groups_split_layers_evenly_and_refuse_the_impossible() -> None:
    assert [g.last - g.first for g in plan(LAYOUT, 2)] == [2, 1]
    assert len(plan(LAYOUT, "auto")) == 1 and len(plan(KVLayout(30, 3, 64), "auto")) == 8
    for bad in (0, 4, "many"):
        with pytest.raises(ConfigError, match="groups"):
            plan(LAYOUT, bad)


def test_split_undoes_gather() -> None:
    group = plan(LAYOUT, 2)[0]
    k, v = torch.randn(2, 4, 2, 2, 5, 8).unbind(1)[:2]
    found = split(gather(k, v), group, LAYOUT, 2)
    assert torch.equal(found[0], k) and torch.equal(found[1], v)


def test_moments_give_the_covariance_that_numpy_gives() -> None:
    groups = plan(LAYOUT, 1)
    moments, rows = Moments(LAYOUT, groups, 0), []
    for i in range(4):
        x, _ = rows_of(LAYOUT, sample(i), groups)
        moments.add(sample(i), x, None)
        rows.append(x)
    identity = torch.eye(8, dtype=torch.float64).expand(3, 2, 2, 8, 8)
    basis = fit.bases(moments, identity, None, None)[0]
    covariance = torch.cat(rows).double().T.cov(correction=0)
    diagonal = basis.T @ covariance @ basis
    assert torch.allclose(diagonal, diagonal.diagonal().diag(), atol=1e-4)
    assert torch.allclose(moments.mean_C, torch.cat(rows).mean(0), atol=1e-5)


def test_sensitivities_tell_keys_from_values() -> None:
    moments = Moments(LAYOUT, plan(LAYOUT, 1), 0)
    for i in range(20):
        moments.add(sample(i), rows_of(LAYOUT, sample(i), moments.groups)[0], None)
    a = fit.sensitivities(moments)
    ratio = a[:, 1].diagonal(dim1=-2, dim2=-1).mean() / a[:, 0].diagonal(dim1=-2, dim2=-1).mean()
    assert float(ratio) == pytest.approx(3**fit.ALPHA, rel=0.05)


def test_prediction_finds_what_depends_on_the_token() -> None:
    table, embedding = torch.randn(9, LAYOUT.values_per_token), torch.randn(9, 12)
    ids = torch.arange(900) % 9
    x = table[ids].view(900, 2, 3, 2, 8).permute(1, 2, 3, 0, 4)
    made = KVSample(LAYOUT.rope.rotate(x[0].contiguous(), torch.arange(900)), x[1].contiguous(), 0, ids)
    codec = create("transform", LAYOUT, calibrate(LAYOUT, [made, made, made], embedding), ratio=40.0, layers=(40.0,))
    block = codec.encode(made.keys[:, :, 64:192], made.values[:, :, 64:192], start=64, tokens=ids[64:192])
    assert block.distortion[1].keys < 0.01 and block.distortion[1].values < 0.01


def test_calibration_refuses_too_little_and_the_wrong_shape() -> None:
    with pytest.raises(InvalidInputError, match="two samples"):
        calibrate(LAYOUT, [sample(0)])
    with pytest.raises(LayoutMismatchError):
        calibrate(KVLayout(2, 2, 8), [sample(0), sample(1)])
    with pytest.raises(InvalidInputError, match="outside the 5 embeddings"):
        calibrate(LAYOUT, [sample(0), sample(1)], torch.randn(5, 4))
    for what in ("keys", "values", "key_grads", "value_grads"):
        spoilt = sample(1)
        getattr(spoilt, what)[1, 0, 9, 2] = float("nan")
        with pytest.raises(InvalidInputError, match=f"{what} hold NaN"):
            calibrate(LAYOUT, [sample(0), spoilt])


def test_gradients_that_are_all_zero_are_as_good_as_none() -> None:
    still = [replace(sample(i), key_grads=torch.zeros(3, 2, 60, 8), value_grads=torch.zeros(3, 2, 60, 8)) for i in range(4)]
    bare = [replace(one, key_grads=None, value_grads=None) for one in still]
    assert calibrate(LAYOUT, still).digest == calibrate(LAYOUT, bare).digest


def test_calibration_is_deterministic() -> None:
    samples = [sample(i) for i in range(5)]
    assert calibrate(LAYOUT, samples, groups=2).digest == calibrate(LAYOUT, samples, groups=2).digest


def test_ladder_cells_tile_the_line() -> None:
    ladder = Ladder.of([100, 60, 20])
    ring = 0.58 * (2 ** (100 / 32) - 2 ** (60 / 32))
    for width, parts in zip(ladder.width, ladder.parts, strict=True):
        assert width[1, 0, 0] == pytest.approx(2 ** (100 / 32), rel=1e-6)
        assert width[1, 0, 0] == pytest.approx(width[2, 0, 0] * parts[1, 0, 0], rel=1e-6)
        assert width[2, 0, 1] == pytest.approx(ring, rel=1e-6)
    assert Ladder.possible([100, 60, 20]) and not any(map(Ladder.possible, ([], [5, 5], [1, 2], [500, 0], [5000])))


def test_the_step_search_finds_the_finest_step_within_budget() -> None:
    for budget in (10.0, 500.0, 90_000.0):
        found = cheapest_within(lambda m: 1e5 * 2 ** (-m / 40), budget, 0, -500, 2000)
        assert 0.98 * budget < 1e5 * 2 ** (-found / 40) <= budget
    assert cheapest_within(lambda m: 1e9, 1.0, 0, -5, 5) == 5
    assert cheapest_within(lambda m: 0.0, 1.0, 0, -5, 5) == -5


def test_the_first_token_is_paid_by_its_sequence() -> None:
    total = sum(budget_bytes(64_000, 16, 64, start, 2000) for start in range(0, 1024, 64))
    assert total == pytest.approx(16 * 64_000 / 16)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, saved as a directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def test_the_command_calibrates_a_real_model(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from kvstore.codecs import Profile
    from services.cli import main

    text = tmp_path / "texts"
    text.mkdir()
    (text / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    out = tmp_path / "tiny.profile"
    assert main(["calibrate", "--model", str(tiny_model), "--texts", str(text), "--tokens", "4096", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    made = Profile.load(out)
    assert result["digest"] == made.digest.hex() and result["tokens"] >= 3000 and made.facts["sensitivities"]
    assert made.facts["divergence"] > 0
    for wrong in (["--groups", "many"], ["--groups", "3"], ["--tokens", "10"], ["--device", "tpu"], ["--out", str(tmp_path)]):
        assert main(["calibrate", "--model", str(tiny_model), "--out", str(out), *wrong]) == 2
        assert wrong[0].strip("-") in capsys.readouterr().err


def test_sliding_windows_and_short_contexts_calibrate_too(tmp_path: Path) -> None:
    """A layer that attends to the last 24 tokens still has all keys in the store, and no window is longer than the model's context."""
    from services.calibrate.run import calibrate_model
    from tests.engine_support import make_model

    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    profile = calibrate_model(make_model("gemma3", tmp_path / "model"), [str(tmp_path / "a.txt")], tokens=4096)
    assert profile.facts["tokens"] == 8 * (512 - 4) and profile.facts["sensitivities"]


def test_bad_arguments_of_the_command(tmp_path: Path) -> None:
    from services.calibrate import texts

    with pytest.raises(ConfigError, match="no such file"):
        texts.read([str(tmp_path / "absent")])
    (tmp_path / "b.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="no text"):
        texts.read([str(tmp_path)])
    with pytest.raises(ConfigError, match="less than one window"):
        texts.windows([(1.0, ["short"])], 2, 1024, lambda text: list(text.encode())[:1])


def test_every_python_has_text_of_several_kinds() -> None:
    from services.calibrate import texts

    kinds = texts.everywhere()
    assert len(kinds) >= 3 and sum(len(d) for _, documents in kinds for d in documents) > 1_000_000
    assert any("washing machine" in d for _, documents in kinds for d in documents), "prose comes with the package"
    windows = texts.windows(kinds, 10, 200, lambda text: list(text.encode()))
    assert len(windows) == 10 and len({tuple(w) for w in windows}) == 10
