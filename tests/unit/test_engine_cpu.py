"""Native decode steps against torch: the same numbers within rounding, and rows that keep their bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from kvstore.layout import KVLayout
from services.engine.cpu.products import RowLinear, use_row_products
from services.engine.cpu.tokens import Batch, can_attend
from services.engine.live import LiveKV, LivePool

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(1, 1, True), (48, 32, False), (77, 131, True), (256, 96, False)])
def test_products_are_those_of_the_library_and_rows_are_alone(dtype, inputs, outputs, bias):
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    ours = RowLinear(linear, 64)
    x = torch.randn(1, 9, inputs, dtype=dtype)
    y = ours(x)
    assert y.dtype == dtype and y.shape == (1, 9, outputs)
    torch.testing.assert_close(y, linear(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for count in range(1, 9):
        for at in range(9 - count):
            assert torch.equal(ours(x[:, at : at + count]), y[:, at : at + count])


def test_float32_weights_that_are_bfloat16_numbers_are_packed_as_such_and_change_no_bit():
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).float()
    ours, full = RowLinear(linear, 64), RowLinear(linear, 64)
    assert ours._packed.dtype == torch.bfloat16
    full._packed = full._packed.float()
    x = torch.randn(5, 64)
    assert torch.equal(ours(x), full(x))


def test_many_rows_and_none_go_to_the_library():
    linear = nn.Linear(16, 24)
    ours = RowLinear(linear, 8)
    for rows in (0, 8, 30):
        x = torch.randn(rows, 16)
        assert torch.equal(ours(x), linear(x))


def test_only_linear_layers_that_can_be_are_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8, dtype=torch.float16)), nn.Embedding(3, 8))
    use_row_products(model, 16)
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [RowLinear, nn.Linear, nn.Embedding]


def caches(layout: KVLayout, lengths: list[int]) -> list[LiveKV]:
    """Caches of random K and V with room for one token more; their pages lie apart, the first cache's backwards."""
    pool = LivePool(layout, 40, 16, torch.device("cpu"))
    pool.k_LHPTD.normal_()
    pool.v_LHPTD.normal_()
    made = []
    for length in lengths:
        kv = LiveKV(pool)
        kv.reserve(length + 1)
        kv.length = length
        made.append(kv)
    made[0].page_ids.reverse()
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("dim", "groups"), [(16, 2), (64, 3), (32, 4)])
def test_attention_of_tokens_is_that_of_torch_and_each_is_alone(dtype, window, dim, groups):
    batch = [(kv, kv.length) for kv in caches(KVLayout(2, 3, dim, dtype), [130, 0, 1, 39, 40])]
    query = torch.randn(1, len(batch), 3 * groups, dim, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(1, 3, len(batch), dim, dtype=dtype) for _ in range(2))
    out = Batch(batch).attend(1, query, key, value, 0.3, window)
    for row, (kv, at) in enumerate(batch):
        k, v = kv.layer(1, at + 1)
        assert torch.equal(k[:, at], key[0, :, row]) and torch.equal(v[:, at], value[0, :, row])
        first = max(0, at + 1 - window) if window else 0
        packed = query[:, :, row].reshape(1, 3, groups, dim).float()
        want = functional.scaled_dot_product_attention(packed, k[None, :, first:].float(), v[None, :, first:].float(), scale=0.3)
        torch.testing.assert_close(out[row].float(), want.reshape(3 * groups, dim), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        alone = Batch(batch[row : row + 1]).attend(1, *(x[:, :, row : row + 1] for x in (query, key, value)), 0.3, window)
        assert torch.equal(alone[0], out[row])


def test_rows_of_padding_are_zero():
    [kv] = caches(KVLayout(1, 2, 8, torch.float32), [5])
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    out = Batch([(kv, 5)]).attend(0, query, key, key, 1.0, None)
    assert out.shape == (3, 4, 8) and out[0].abs().sum() > 0 and not out[1:].any()


def test_float16_is_left_to_torch():
    assert can_attend(caches(KVLayout(1, 1, 8, torch.float32), [1])[0].pool)
    assert not can_attend(caches(KVLayout(1, 1, 8, torch.float16), [1])[0].pool)
