"""The memory planner, by its command: against arithmetic that anyone can do, and against real blocks."""

from __future__ import annotations

import json

import pytest
import torch

from kvstore.codecs import create
from kvstore.layout import KVLayout
from services.cli import main

OPT_30B = ["--layers", "48", "--kv-heads", "56", "--head-dim", "128"]


def planned(capsys: pytest.CaptureFixture, *options: str) -> dict:
    assert main(["plan", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_cache_of_a_30b_model(capsys: pytest.CaptureFixture) -> None:
    plan = planned(capsys, *OPT_30B, "--batch", "128", "--context", "1024")
    assert plan["bytes_per_token"] == 2 * 48 * 56 * 128 * 2
    assert plan["raw_bytes"] == pytest.approx(180e9, rel=0.01)


def test_codecs_hold_what_they_say(capsys: pytest.CaptureFixture) -> None:
    plan = planned(capsys, "--layers", "4", "--kv-heads", "2", "--head-dim", "64", "--arena", "10MiB", "--nodes", "3", "--ratio", "16")
    by_name = {entry["codec"]: entry for entry in plan["codecs"]}
    assert 0.99 < by_name["raw"]["ratio"] < 1
    assert by_name["int8"]["ratio"] == pytest.approx(1.9, abs=0.1)
    assert by_name["transform"]["ratio"] == pytest.approx(16, rel=0.001)
    for entry in plan["codecs"]:
        block_bytes = entry["stored_bytes"] / (4096 // 64)
        assert entry["tokens_that_fit"] == int((10 << 20) / block_bytes) * 3 * 64
        assert entry["nodes_needed"] * (10 << 20) >= entry["stored_bytes"] > (entry["nodes_needed"] - 1.1) * (10 << 20)


def test_sizes_are_those_of_real_blocks(capsys: pytest.CaptureFixture) -> None:
    plan = planned(capsys, "--layers", "5", "--kv-heads", "3", "--head-dim", "32", "--context", "64")
    layout = KVLayout(5, 3, 32)
    noise = torch.randn((5, 3, 64, 32)).to(layout.dtype)
    for entry in plan["codecs"]:
        if entry["codec"] not in ("svd", "transform"):
            assert entry["stored_bytes"] == len(create(entry["codec"], layout).encode(noise, noise, start=64).to_bytes())


def test_an_arena_too_small_for_one_block_needs_no_number_of_nodes(capsys: pytest.CaptureFixture) -> None:
    plan = planned(capsys, *OPT_30B, "--arena", "1MiB")
    raw = plan["codecs"][0]
    assert raw["nodes_needed"] is None and raw["tokens_that_fit"] == 0


@pytest.mark.parametrize(
    "options",
    [["--layers", "4"], [*OPT_30B, "--model", "x"], [*OPT_30B, "--batch", "0"], [*OPT_30B, "--ratio", "0.5"], ["--model", "/nowhere"]],
)
def test_what_cannot_be_planned_is_refused(options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *options]) == 2
    assert "concertina plan:" in capsys.readouterr().err


def test_the_table_for_people(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *OPT_30B, "--arena", "64GiB"]) == 0
    out = capsys.readouterr().out
    assert "transform" in out and "tokens that fit 2 × 64.0 GiB" in out
