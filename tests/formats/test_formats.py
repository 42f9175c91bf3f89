"""The row x column format and its layer: what is stored is what is computed with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import BinaryLinear, RowColumn, binary_matmul, packed_width
from lit_binq.formats.registry import empty_layer


def random_solution(N: int, K: int, seed: int, *, signed: bool = False) -> RowColumn:
    g = torch.Generator().manual_seed(seed)
    r, c = torch.rand(N, generator=g) + 0.1, torch.rand(K, generator=g) + 0.1
    if signed:
        r, c = (
            r * (torch.randint(2, (N,), generator=g) * 2 - 1),
            c * (torch.randint(2, (K,), generator=g) * 2 - 1),
        )
    return RowColumn(r, c, torch.randint(2, (N, K), generator=g).float() * 2 - 1)


sizes = st.integers(1, 40)


@settings(deadline=None, max_examples=40)
@given(N=sizes, K=sizes, seed=st.integers(0, 1000), power=st.integers(-18, 18))
def test_balancing_keeps_the_weight_and_makes_scales_positive_and_alike(N, K, seed, power):
    s = random_solution(N, K, seed, signed=True)
    s = RowColumn(s.r * 2.0**power, s.c / 2.0**power, s.B)
    balanced = s.balanced()
    assert torch.equal(balanced.dense(), s.dense())  # powers of two and signs move, nothing rounds
    assert (balanced.r > 0).all()
    assert (balanced.c > 0).all()
    assert abs(float(balanced.r.log2().mean() - balanced.c.log2().mean())) <= 1.0 + 1e-4


@settings(deadline=None, max_examples=40)
@given(N=sizes, K=sizes, seed=st.integers(0, 1000), bias=st.booleans())
def test_layer_computes_with_what_it_stores(N, K, seed, bias):
    s = random_solution(N, K, seed, signed=True)
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(N, generator=g) if bias else None
    layer = BinaryLinear.from_solution(s, b)
    x = torch.randn(2, 3, K, generator=g)
    W = layer.dequantize()
    expected = torch.nn.functional.linear(x.double(), W.double(), None if b is None else b.double())
    assert torch.allclose(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(W, s.dense(), rtol=2e-3)  # float16 scales
    assert torch.equal(torch.sign(W), torch.sign(s.dense()))
    assert torch.equal(layer.solution().dense(), W)


@settings(deadline=None, max_examples=40)
@given(N=sizes, K=sizes, bias=st.booleans())
def test_true_bits_count_every_stored_byte(N, K, bias):
    layer = BinaryLinear(K, N, bias)
    state = layer.state_dict()
    stored = sum(t.numel() * t.element_size() for name, t in state.items() if name != "bias")
    assert layer.stored_bits() == 8 * stored == 8 * N * packed_width(K) + 16 * (N + K)
    assert layer.true_bits() == layer.stored_bits() / (N * K)
    assert ("bias" in state) == bias


def test_true_bits_of_a_real_shape():
    assert BinaryLinear(576, 576).true_bits() == pytest.approx(1 + 16 * 2 * 576 / 576**2)
    assert BinaryLinear(4096, 4096).true_bits() < 1.008


def test_state_round_trip_into_an_empty_layer():
    linear = nn.Linear(13, 7)
    layer = BinaryLinear.from_solution(random_solution(7, 13, 0), linear.bias.detach())
    empty = empty_layer(linear, {"format": "row_column"})
    assert float(empty(torch.ones(1, 13)).abs().max()) == 0
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(5, 13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(empty(x), layer(x))
    assert empty_layer(nn.Linear(3, 2, bias=False), {"format": "row_column"}).bias is None


def test_the_bias_is_a_copy():
    bias = torch.zeros(7)
    layer = BinaryLinear.from_solution(random_solution(7, 13, 0), bias)
    bias += 1
    assert float(layer.bias.abs().max()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e12])
def test_scales_that_do_not_fit_are_refused(bad):
    s = random_solution(4, 6, 0)
    s.r[2] = bad
    with pytest.raises(LitBinqError, match=r"(row|col)_scale has values that float16 cannot hold"):
        BinaryLinear.from_solution(s)


def test_zero_scales_stay_zero():
    s = random_solution(4, 6, 0)
    s.r[2] = 0
    W = BinaryLinear.from_solution(s).dequantize()
    assert float(W[2].abs().max()) == 0
    assert torch.isfinite(W).all()


def test_the_custom_operator_is_well_formed():
    layer = BinaryLinear.from_solution(random_solution(5, 11, 0), torch.ones(5))
    arguments = (torch.randn(2, 11), layer.codes, layer.row_scale, layer.col_scale, layer.bias, 11)
    torch.library.opcheck(
        binary_matmul, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_result_has_the_inputs_dtype(dtype):
    layer = BinaryLinear.from_solution(random_solution(5, 11, 0), torch.ones(5))
    assert layer(torch.ones(2, 11, dtype=dtype)).dtype == dtype


def test_representation_tells_the_bits():
    assert "true_bits=1.056" in repr(BinaryLinear(576, 576))
