"""Forwards that are padded to one number of rows: nothing is written for padding, and answers are those of plain transformers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kvstore.clock import SystemClock
from kvstore.settings import environment
from services.engine.config import EngineConfig
from services.engine.cuda import prefill_rows
from services.engine.live import LiveKV, LivePool
from services.engine.loading import load
from services.engine.runner import NextToken, PromptTile, Runner, Shapes
from services.engine.shapes import find_shapes, pages_needed
from tests.engine_support import VOCABULARY, make_model, prompt, reference

SIZE = 16


def made(path, pages: int = 24) -> Runner:
    loaded = load(EngineConfig(str(path), dtype="float32"))
    runner = Runner(loaded.model, LivePool(loaded.layout, pages, SIZE, torch.device("cpu")))
    runner.shapes = Shapes((1, 2, 3, 4), 4, 4, prefill=4 * SIZE)
    return runner


def generate(runner: Runner, prompts: list[tuple[int, ...]], new: int) -> list[list[int]]:
    """Greedy answers, the tiles of all prompts one after the other in full steps, the last of each partial; then all decode."""
    caches = [LiveKV(runner.pool) for _ in prompts]
    tiles = [
        PromptTile(kv, at, p[at : at + SIZE], logits=at + SIZE >= len(p))
        for kv, p in zip(caches, prompts, strict=True)
        for at in range(0, len(p), SIZE)
    ]
    logits = torch.cat([runner.prefill(tiles[at : at + 4]) for at in range(0, len(tiles), 4)])
    answers = [[int(row.argmax())] for row in logits]
    for step in range(new - 1):
        rows = [NextToken(kv, a[-1], len(p) + step) for kv, a, p in zip(caches, answers, prompts, strict=True)]
        for answer, row in zip(answers, runner.decode(rows), strict=True):
            answer.append(int(row.argmax()))
    for kv in caches:
        kv.release()
    return answers


class Relauncher:
    """Stands in for recordings where there is no GPU: launches anew, from what a recording would see, the frame alone."""

    def record(self, launch):
        return SimpleNamespace(replay=launch)


def check(path, kernels: bool, lengths: tuple[int, ...], new: int) -> None:
    """Alone and together, after memory has been filled with what must not be read."""
    prompts = [prompt(n, seed=n) for n in lengths]
    want = [reference(path, p, new) for p in prompts]
    runner = made(path)
    if kernels:
        from services.engine.cuda import forwards

        forwards.LEAST_TOKENS, forwards.Recorder = 64, Relauncher  # programs without work take time here
        runner.forwards = forwards.Forwards(runner.model, runner.pool)
        with torch.inference_mode():
            runner.record(SIZE * 8)
    for x in (runner.pool.k_LHPTD, runner.pool.v_LHPTD):
        x.fill_(float("nan"))
    assert generate(runner, prompts, new) == want
    assert [generate(runner, [p], new)[0] for p in prompts] == want
    held = runner.pool.k_LHPTD.isnan().all(-1).sum(dim=(0, 1, 2))
    assert held.all(), "pages that nobody had are as they were"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_padded_steps_answer_as_plain_transformers_does(family, tmp_path):
    check(make_model(family, tmp_path), False, (5, 40, 64, 77), 6)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_padded_steps_with_interpreted_kernels(tmp_path):
    path = str(make_model("gemma3", tmp_path))
    program = f"from tests.unit.test_engine_padding import check; check({path!r}, True, (5, 40), 3); print('equal')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_padding_is_kept_while_tiles_agree_in_all_places(tmp_path, monkeypatch):
    runner = made(make_model("llama", tmp_path), pages_needed(range(1, 5), 3))
    shapes, rate = find_shapes(runner, VOCABULARY, range(1, 5), 3, SystemClock(), 4 * SIZE)
    assert shapes == Shapes((1, 2, 3, 4), 8, 8, 4 * SIZE) and rate > 0
    monkeypatch.setattr("services.engine.shapes._tiles_agree", lambda runner, prompt, count, *rest: count < 3)
    shapes, _ = find_shapes(runner, VOCABULARY, range(1, 5), 3, SystemClock(), 4 * SIZE)
    assert shapes == Shapes((1, 2), 8, 8, 2 * SIZE)


@pytest.mark.parametrize(
    ("tile", "tiles", "rows", "weights", "want"),
    [
        (64, 16, 256, 1, 256), (64, 3, 256, 1, 128), (16, 16, 200, 1, 128), (512, 16, 256, 1, 512),
        (64, 16, 0, 10**6, 1024), (64, 16, 0, 5 * 10**8, 512), (64, 16, 0, 8 * 10**9, 256),
    ],
)  # fmt: skip
def test_rows_are_a_power_of_two_times_the_tile(tile, tiles, rows, weights, want):
    assert prefill_rows(torch.device("cuda"), tile, tiles, rows, weights) == want
    assert prefill_rows(torch.device("cpu"), tile, tiles, rows, weights) == 0
