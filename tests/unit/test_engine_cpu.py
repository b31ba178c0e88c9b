"""Native decode steps against torch: the same numbers within rounding, and rows that keep their bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from kvstore.layout import KVLayout
from services.engine.cpu.gated import GatedMLP, gated, use_gated_mlps
from services.engine.cpu.norms import RowNorm, use_row_norms
from services.engine.cpu.products import RowLinear, _Panels, join_siblings, use_row_products
from services.engine.cpu.tokens import Batch, can_attend_tokens
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
    assert ours._panels.packed.dtype == torch.bfloat16
    full._panels = _Panels(full._panels.packed.float(), 1)
    x = torch.randn(5, 64)
    assert torch.equal(ours(x), full(x))


def test_many_rows_and_none_go_to_a_library_that_is_faster(monkeypatch):
    monkeypatch.setattr("services.engine.cpu.products.beats_library", lambda: False)
    linear = nn.Linear(16, 24)
    ours = RowLinear(linear, 8)
    for rows in (0, 8, 30):
        x = torch.randn(rows, 16)
        assert torch.equal(ours(x), linear(x))


@pytest.mark.parametrize("exact", [True, False])  # whether bfloat16 holds the weights
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(1, 1, True), (77, 131, False), (256, 96, True)])
def test_a_row_has_the_same_bits_among_many_as_among_few(monkeypatch, exact, inputs, outputs, bias):
    monkeypatch.setattr("services.engine.cpu.products.beats_library", lambda: True)
    linear = nn.Linear(inputs, outputs, bias=bias)
    if exact:
        linear.to(torch.bfloat16).float()
    few, many = RowLinear(linear, 1000), RowLinear(linear, 8)
    x = torch.randn(3, 131, inputs)
    y = many(x)
    torch.testing.assert_close(y, linear(x))
    for rows in (8, 9, 10, 11, 393):
        assert torch.equal(many(x.flatten(0, 1)[:rows]), y.flatten(0, 1)[:rows])
    assert torch.equal(few(x[:, :5]), y[:, :5])


def test_only_linear_layers_that_can_be_are_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8, dtype=torch.float16)), nn.Embedding(3, 8))
    use_row_products(model, 16)
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [RowLinear, nn.Linear, nn.Embedding]


def test_layers_that_get_the_same_rows_are_computed_together_and_keep_their_bits():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(40, 131), nn.Linear(40, 20, bias=False), nn.Linear(40, 40)
            self.last = nn.Linear(40, 8)

        def forward(self, x):
            a, b, c = self.a(x), self.b(x), self.c(x)
            return a, b, c, self.last(c + 1)

    block = Block()
    use_row_products(block, 16)
    x, other = torch.randn(1, 5, 40), torch.randn(1, 5, 40)
    apart = block(x), block(other)
    join_siblings(block, lambda: block(x[:, :1]))
    assert block.a._panels is block.b._panels is block.c._panels and block.last._panels.layers == 1
    for given, want in zip((x, other), apart, strict=True):
        assert all(map(torch.equal, block(given), want))
    # Called in another order, or only one of them, each still answers for what it was given.
    assert torch.equal(block.b(x), apart[0][1]) and torch.equal(block.c(other), apart[1][2])
    assert torch.equal(block.a(other), apart[1][0]) and torch.equal(block.b(x), apart[0][1])
    assert torch.equal(block.a(torch.randn(1, 20, 40)[:, :16].contiguous() * 0), block.a.bias.expand(1, 16, 131))


@pytest.mark.parametrize("ones", [0.0, 1.0])
def test_norms_are_those_of_the_model_and_rows_are_alone(ones):
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(77)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (ones + self.weight)

    class OtherRMSNorm(OddRMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(OddRMSNorm(), OtherRMSNorm(), nn.LayerNorm(77))
    norm, (_, *kept) = model[0], model
    use_row_norms(model)
    assert type(model[0]) is RowNorm and list(model)[1:] == kept
    x = torch.randn(40, 77)
    y = model[0](x)
    torch.testing.assert_close(y, norm(x), rtol=1e-5, atol=1e-6)
    for start, stop in ((0, 1), (3, 17), (10, 40)):
        assert torch.equal(model[0](x[start:stop]), y[start:stop])


def test_activations_are_those_of_the_library_and_rows_are_alone():
    wide = torch.cat([torch.randn(30, 40) * 8, torch.linspace(-150, 150, 40)[None]])
    gate, up = wide[:, :33], torch.randn(31, 70)[:, 5:38]  # parts of wider rows, as joined layers give
    y = gated(gate, up)
    torch.testing.assert_close(y, functional.silu(gate) * up, rtol=1e-5, atol=1e-30)
    for start, stop in ((0, 1), (3, 18), (9, 31)):
        assert torch.equal(gated(gate[start:stop], up[start:stop]), y[start:stop])
    assert gated(torch.tensor([[float("nan")]]), torch.ones(1, 1)).isnan()


def test_only_modules_that_are_the_function_become_native():
    class MLP(nn.Module):
        def __init__(self, act, dtype=torch.float32):
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(24, 56, bias=False, dtype=dtype) for _ in range(2))
            self.down_proj, self.act = nn.Linear(56, 24, bias=False, dtype=dtype), act

        def forward(self, x):
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Sequential(MLP(functional.silu), MLP(functional.gelu), MLP(functional.silu, torch.bfloat16))
    use_row_products(model, 16)
    x = torch.randn(1, 5, 24)
    want = model[0](x)
    use_gated_mlps(model)
    assert [type(mlp) for mlp in model] == [GatedMLP, MLP, MLP]
    torch.testing.assert_close(model[0](x), want, rtol=1e-5, atol=1e-6)


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
    assert can_attend_tokens(caches(KVLayout(1, 1, 8, torch.float32), [1])[0].pool)
    assert not can_attend_tokens(caches(KVLayout(1, 1, 8, torch.float16), [1])[0].pool)
