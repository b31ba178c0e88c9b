"""What holds for every press of the table."""

from __future__ import annotations

import asyncio

import pytest
import torch

from kvstore.errors import InvalidInputError
from kvstore.layout import KVLayout
from services.engine.base import CacheMode
from services.engine.live import LiveKV, LivePool
from services.engine.presses import PRESSES, create_press
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return make_model("gemma3", tmp_path_factory.mktemp("gemma3"))


def cache(press, length: int) -> LiveKV:
    """A cache of random K and V whose tokens' queries the press has seen."""
    generator = torch.Generator().manual_seed(0)
    kv = LiveKV(LivePool(LAYOUT, 64, 16, torch.device("cpu")))
    kv.pool.k_LHPTD.normal_(generator=generator)
    kv.pool.v_LHPTD.normal_(generator=generator)
    kv.reserve(length)
    kv.length = length
    for layer in range(LAYOUT.layers):
        press.see(layer, torch.randn(2, 3, length, 8, generator=generator), kv, length, 0.35, None)
    return kv


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("budget", [8, 9, 64, 300])
@pytest.mark.parametrize("over", [0, 1, 200])
def test_a_press_keeps_its_budget_and_leaves_room(name, budget, over):
    press, room = create_press(name, budget), max(1, budget // 16)
    kv = cache(press, budget + over)
    places = press.keep(kv, room)
    assert places.shape == (2, 2, budget - room)
    assert (places.diff(dim=-1) > 0).all() and places.min() >= 0 and places.max() < budget + over
    k = kv.keys().clone()
    kv.keep(places)
    assert kv.length == budget - room and torch.equal(kv.positions_LHT, places)
    assert torch.equal(kv.keys(), k.gather(2, places[..., None].expand(-1, -1, -1, 8)))
    assert kv.pool.pages.free == 64 - -(-kv.length // 16) and kv.pool.pages.check()


@pytest.mark.parametrize("name", PRESSES)
def test_a_cache_within_budget_is_kept_whole(name):
    press = create_press(name, 100)
    assert torch.equal(press.keep(cache(press, 50), 5), torch.arange(50).expand(2, 2, 50))


@pytest.mark.parametrize("name", PRESSES)
def test_a_budget_that_is_too_small_is_refused(name):
    with pytest.raises(InvalidInputError, match="budget of at least"):
        create_press(name, 0)


@pytest.mark.parametrize("name", PRESSES)
async def test_budgets_are_kept_at_every_step_and_full_ones_are_exact(name, model):
    async with running(model) as engine:
        exact, _ = await answer(engine, spec(prompt(60), 40))
        full, _ = await answer(engine, spec(prompt(60), 40, press=name, kv_tokens=100))
        lengths = []
        async for _ in engine.generate(spec(prompt(60), 40, press=name, kv_tokens=32)):
            lengths += [job.kv.length for job in engine._core._jobs.values()]
    assert full == exact
    assert lengths and max(lengths) <= 32


@pytest.mark.parametrize("name", PRESSES)
async def test_a_press_works_in_a_batch_of_others_and_beside_raw_hits(name, model):
    squeezed = spec(prompt(100), 30, press=name, kv_tokens=24)
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        plain, _ = await answer(engine, spec(prompt(100), 30, cache_mode=CacheMode.BYPASS))
        alone, _ = await answer(engine, squeezed)
        await published(engine, store, 6)
        names = [name, *(n for n in PRESSES if n != name)][:3]
        crowd = [answer(engine, spec(prompt(100), 30, press=n, kv_tokens=24)) for n in names]
        (again, last), *_, (beside, _) = await asyncio.gather(*crowd, answer(engine, spec(prompt(100), 30)))
    assert again == alone != plain
    assert beside == plain
    queries = create_press(name, 24).queries
    assert last.cache.cached_tokens == max(0, 100 - max(1, queries)) // 16 * 16


@pytest.mark.parametrize("name", PRESSES)
async def test_what_a_press_dropped_is_never_published(name, model):
    store, whole = MemoryStore(), MemoryStore()
    async with running(model, store, codec="int8") as engine:
        await answer(engine, spec(prompt(70), 40, press=name, kv_tokens=24))
        await published(engine, store, 4)
    async with running(model, whole, codec="int8") as engine:
        await answer(engine, spec(prompt(70), 1))
        await published(engine, whole, 4)
    assert [b.to_bytes() for b in store.blocks()] == [b.to_bytes() for b in whole.blocks()]


@pytest.mark.parametrize("name", PRESSES)
async def test_windows_of_layers_count_positions_not_places(name, windowed):
    async with running(windowed) as engine:
        tokens, _ = await answer(engine, spec(prompt(90), 40, press=name, kv_tokens=48))
    assert len(tokens) == 40


def test_an_unknown_press_is_refused_and_none_is_none():
    with pytest.raises(InvalidInputError, match="known: sliding_window"):
        create_press("squeeze", 100)
    assert create_press("", 0) is None
