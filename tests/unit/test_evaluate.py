"""The quality harness on a tiny model: exact where nothing is lost, and honest where something is."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvstore.codecs import create
from kvstore.errors import ConfigError
from services.cli import main
from services.evaluate import divergence, windows
from services.evaluate.model import CachedModel, through
from services.evaluate.report import COMPARED, Evaluation, Plan, plot, table
from services.model.directory import fingerprint
from services.profiles.obtain import layout_of
from tests.engine_support import make_model
from tests.profile_support import profile_of

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew a potion of bright green herbs\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(2):
        (folder / f"text{number}.txt").write_text(WORDS * (20 + number), encoding="utf-8")
    return [str(folder)]


@pytest.fixture(scope="module")
def evaluation(model_dir, texts):
    return Evaluation(CachedModel.load(model_dir), Plan(texts, prefix_tokens=64, continued_tokens=32, most_windows=2, questions=False))


def test_raw_moves_nothing_and_fewer_bits_move_more(evaluation):
    results = {name: evaluation.measure(evaluation.codec(name, None, {}), 16) for name in ("raw", "int8", "int4", "int2")}
    raw = results["raw"]
    assert raw["kl_mean_nats"] == pytest.approx(0, abs=1e-6) and raw["top1_agreement"] == 1.0
    assert raw["perplexity_factor"] == pytest.approx(1, abs=1e-5) and raw["key_error"] == 0.0
    assert raw["ratio"] < 0.5, "float32 values count as 4 bytes, the ratio's numerator as 2, and the header counts too"
    divergences = [results[name]["kl_mean_nats"] for name in ("raw", "int8", "int4", "int2")]
    assert divergences == sorted(divergences) and divergences[1] < divergences[3] / 100
    for result in results.values():
        low, high = result["perplexity_factor_95"]
        assert low <= result["perplexity_factor"] <= high
        assert set(result["kl_by_text_nats"]) == {"text0.txt", "text1.txt"}
        json.dumps(result)


def test_ratio_counts_every_byte_of_every_blob(evaluation):
    item = evaluation.prepared[0]
    codec = evaluation.codec("int8", None, {})
    _, stored = through(codec, item.cache, item.window.ids[:64], 16)
    keys, values = item.cache
    blobs = [codec.encode(keys[:, :, a : a + 16], values[:, :, a : a + 16], start=a).to_bytes() for a in range(0, 64, 16)]
    assert stored.size_bytes == sum(map(len, blobs)) and stored.expected_divergence_nats == 0
    assert evaluation.measure(codec, 16)["ratio"] == pytest.approx(2 * 2 * keys.numel() / stored.size_bytes, rel=1e-6)


def test_a_cache_taken_out_and_put_back_continues_as_if_never_touched(evaluation):
    item = evaluation.prepared[0]
    whole, _ = evaluation.model.run(item.window.ids)
    assert np.allclose(whole[64:].numpy(), item.log_p.numpy(), atol=1e-4)


def test_rounds_compound_with_a_coarse_codec_only(evaluation):
    exact = divergence.rounds(evaluation.model, evaluation.codec("raw", None, {}), evaluation.prepared[0], 16)
    coarse = divergence.rounds(evaluation.model, evaluation.codec("int2", None, {}), evaluation.prepared[0], 16)
    assert [r["round"] for r in exact] == [1, 2, 3, 4, 5]
    assert all(r["kl_mean_nats"] == pytest.approx(0, abs=1e-6) for r in exact)
    assert all(r["kl_mean_nats"] > 1e-4 for r in coarse)


def test_questions_are_answered_alike_through_a_lossless_codec(model_dir):
    plan = Plan(["/dev/null"], 32, 16)
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.model, evaluation.plan = CachedModel.load(model_dir), plan
    from services.evaluate import tasks

    questions = tasks.recall(evaluation.model, lists=1, pairs=12)
    assert len(questions[0].spans) == 2 and all(b > a for a, b in questions[0].spans)
    accuracy = tasks.Accuracy(evaluation.model, questions, lambda done, total: None)
    measured = accuracy.measure(create("raw", evaluation.model.layout), 64)
    assert measured["accuracy_compressed"] == measured["accuracy_exact"]
    straw = evaluation.model.ids(WORDS * 4)
    asked = tasks.pass_key(evaluation.model, straw, trials=3, tokens=60)
    depths = [evaluation.model.tokenizer.decode(q.prefix).index("The pass key is") for q in asked]
    assert depths == sorted(depths), "the keys lie deeper and deeper"
    for question in asked:
        (first, last), *_ = question.spans
        answer = evaluation.model.tokenizer.decode(question.continuation[first:last]).strip()
        assert answer.isdigit() and answer in evaluation.model.tokenizer.decode(question.prefix)


def test_the_bootstrap_interval_covers_the_mean_and_narrows():
    rng = np.random.default_rng(0)
    few, many = ([rng.normal(0.1, 0.3, 128) for _ in range(n)] for n in (2, 60))
    spans = [divergence.bootstrap(changes) for changes in (few, many)]
    assert all(low < high for low, high in spans)
    assert spans[1][1] - spans[1][0] < (spans[0][1] - spans[0][0]) / 2
    assert spans[1][0] < np.exp(np.concatenate(many).mean()) < spans[1][1]
    assert divergence.bootstrap(few) == spans[0], "seeded"


def test_windows_need_texts_that_are_long_enough(model_dir, texts):
    model = CachedModel.load(model_dir)
    assert {len(w.ids) for w in windows.collect(model, texts, 50, 4)} == {50}
    with pytest.raises(ConfigError, match="longer texts"):
        windows.collect(model, texts, 100_000, 2)
    with pytest.raises(ConfigError, match="no such file"):
        windows.collect(model, ["/nonexistent"], 50, 2)


def test_every_compared_codec_exists_and_is_drawn(evaluation):
    for name, options, _ in COMPARED:
        if name != "transform":
            evaluation.codec(name, None, options)
    results = [evaluation.measure(evaluation.codec(name, None, {}), 16) for name in ("int8", "int4")]
    assert [t.text for t in ET.fromstring(plot(results)).iter("{http://www.w3.org/2000/svg}text")][-2:] == ["int8", "int4"]
    assert "int4" in table(results)


def test_the_command_prints_one_object_and_refuses_what_cannot_be(model_dir, texts, capsys):
    base = ["evaluate", "--json", "--model", str(model_dir), "--texts", *texts, "--prefix", "32", "--continue", "16"]
    base += ["--windows", "1", "--quick"]
    assert main([*base, "--codec", "svd", "--ratio", "3", "--block", "32"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["codec"] == "svd" and result["options"]["ratio"] == 3.0 and result["windows"] == 1
    assert main([*base, "--codec", "int8", "--ratio", "3"]) == 2
    assert "no option ratio" in capsys.readouterr().err
    assert main([*base, "--codec", "transform", "--profile", "/nonexistent"]) == 2
    assert "calibrate" in capsys.readouterr().err
    assert main([*base, "--plot", "x.svg"]) == 2


def test_a_profile_is_made_once_and_another_models_is_refused(model_dir, texts, tmp_path, monkeypatch, capsys):
    """Without `--profile` the model is calibrated and the profile kept; the second command finds it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def calibrate_model(directory, report):
        made.append(directory)
        return profile_of(layout_of(directory), fingerprint(directory))

    monkeypatch.setattr("services.calibrate.run.calibrate_model", calibrate_model)
    asked = ["--json", "--model", str(model_dir), "--texts", *texts, "--prefix", "64", "--continue", "16", "--windows", "1", "--quick"]
    assert main(["evaluate", *asked, "--codec", "transform", "--max-divergence", "0.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["options"]["max_divergence"] == 0.5 and result["expected_divergence_nats"] <= 0.5
    assert main(["evaluate", *asked, "--compare"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(made) == 1 and {r["codec"] for r in results} == {name for name, _, _ in COMPARED}
    assert [r["fidelity"] for r in results if r["fidelity"]] == [1, 2] and "transform, 1" in table(results)
    other = tmp_path / "other.profile"
    profile_of(layout_of(model_dir), "ab" * 32).save(other)
    assert main(["evaluate", *asked, "--codec", "transform", "--profile", str(other)]) == 2
    assert "calibrate this model" in capsys.readouterr().err
