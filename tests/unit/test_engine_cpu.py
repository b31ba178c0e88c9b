"""Native decode steps against torch: the same numbers within rounding, and rows that keep their bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from kvstore.layout import KVLayout
from services.engine.cpu.products import RowLinear, use_row_products
from services.engine.cpu.tokens import attend_tokens, can_attend, places
from services.engine.live import LiveKV

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


def cache(layout: KVLayout, length: int) -> LiveKV:
    kv = LiveKV(layout, length + 1, length + 1, 16, torch.device("cpu"))
    kv.k_LHTD.normal_()
    kv.v_LHTD.normal_()
    kv.length = length
    return kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
def test_attention_of_tokens_is_that_of_torch_and_each_is_alone(dtype, window):
    layout = KVLayout(2, 3, 16, dtype)
    caches = [cache(layout, n) for n in (0, 1, 39, 40, 130)]
    at = places([(kv, kv.length) for kv in caches])
    query = torch.randn(1, len(caches), 6, 16, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(1, 3, len(caches), 16, dtype=dtype) for _ in range(2))
    out = attend_tokens(at, 1, query, key, value, 0.3, window)
    for row, kv in enumerate(caches):
        stop = kv.length + 1
        assert torch.equal(kv.k_LHTD[1, :, stop - 1], key[0, :, row]) and torch.equal(kv.v_LHTD[1, :, stop - 1], value[0, :, row])
        first = max(0, stop - window) if window else 0
        k, v = kv.k_LHTD[1:2, :, first:stop].float(), kv.v_LHTD[1:2, :, first:stop].float()
        packed = query[:, :, row].reshape(1, 3, 2, 16).float()
        want = functional.scaled_dot_product_attention(packed, k, v, scale=0.3).reshape(6, 16)
        torch.testing.assert_close(out[row].float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        alone = attend_tokens(at[row : row + 1], 1, *(x[:, :, row : row + 1] for x in (query, key, value)), 0.3, window)
        assert torch.equal(alone[0], out[row])


def test_rows_of_padding_are_zero():
    kv = cache(KVLayout(1, 2, 8, torch.float32), 5)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    out = attend_tokens(places([(kv, 5)]), 0, query, key, key, 1.0, None)
    assert out.shape == (3, 4, 8) and out[0].abs().sum() > 0 and not out[1:].any()


def test_float16_and_other_devices_are_left_to_torch():
    assert can_attend(cache(KVLayout(1, 1, 8, torch.float32), 1))
    assert not can_attend(cache(KVLayout(1, 1, 8, torch.float16), 1))
