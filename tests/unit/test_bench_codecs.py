"""``concertina bench codecs``, and what every benchmark's result carries."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from services.bench import BENCHES
from services.bench.base import SCHEMA_VERSION, Result, relative_speed, take_turns
from services.cli import main
from tests.engine_support import make_model


def test_contestants_take_turns_and_warm_up_is_not_counted():
    calls = []
    samples = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}


def test_speed_is_compared_within_each_round():
    assert relative_speed({"ours": [1.0, 10.0, 2.0], "copy": [3.0, 30.0, 4.0]}, "ours", "copy") == 3.0


def test_a_result_says_what_it_ran_on():
    result = Result("x", {"size_bytes": 1}, samples={"copy_s": [1.0]}).to_json()
    assert {"schema_version", "benchmark", "commit", "hardware", "versions", "configuration"} <= set(result)
    assert {"seed", "samples", "rows", "ratios"} <= set(result)
    assert result["schema_version"] == SCHEMA_VERSION and result["hardware"]["cores"] >= 1 and "torch" in result["versions"]
    json.dumps(result)


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_of_the_table_can_be_run_and_rendered(name):
    module = importlib.import_module(BENCHES[name][0])
    assert all(callable(getattr(module, f)) for f in ("configure", "run", "render"))


@pytest.mark.parametrize("argv", [["bench", "--json", "codecs"], ["bench", "codecs", "--json"]])
def test_bench_codecs_measures_each_codec_beside_copy_and_prefill(argv, tmp_path, capsys):
    model = make_model("llama", tmp_path)
    options = ["--model", str(model), "--tokens", "64", "--block", "16", "--rounds", "2", "--codec", "raw", "int8"]
    assert main([*argv, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["samples"]) == {
        f"{n}_s" for n in ("prefill", "prefill_float32", "copy", "raw.encode", "raw.decode", "int8.encode", "int8.decode")
    }
    assert result["configuration"]["device"] == "cpu"
    assert all(len(s) == 2 and min(s) > 0 for s in result["samples"].values())
    raw, int8 = result["rows"]
    assert raw["key_error"] == 0 < int8["key_error"] < 1e-3 and raw["ratio"] < 1 < int8["ratio"]
    assert result["ratios"]["int8.decode_to_copy"] == int8["decode_to_copy"] > 0
    assert int8["decode_to_prefill_float32"] > 0 and (int8["decode_extra_bytes"] is None or int8["decode_extra_to_raw"] >= 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["bench", "codecs", "--model", str(make_model("llama", tmp_path)), "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_table_for_people_has_a_line_a_codec(tmp_path, capsys):
    model = make_model("llama", tmp_path)
    sizes = ["--tokens", "32", "--block", "16", "--rounds", "1"]
    assert main(["bench", "codecs", "--model", str(model), *sizes, "--codec", "raw", "int4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["codec", "raw", "int4"]


def test_a_prompt_shorter_than_a_block_is_refused(tmp_path, capsys):
    assert main(["bench", "codecs", "--model", str(make_model("llama", tmp_path)), "--tokens", "8"]) == 2
    assert "at least one block" in capsys.readouterr().err
