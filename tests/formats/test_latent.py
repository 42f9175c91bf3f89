"""The trainable layer of the packed layer: the same weight forward, the dense formula's gradients, and back again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import BinaryLinear, LatentBinaryLinear, RowColumn
from lit_binq.solvers import Problem
from lit_binq.solvers.row_column import RowColumnSolver

N, K = 5, 11


def solution(seed: int = 0, shape: tuple[int, int] = (N, K)) -> RowColumn:
    """Scales of either sign that float16 holds exactly."""
    g = torch.Generator().manual_seed(seed)
    r, c = (torch.randn(n, generator=g).half().float() for n in shape)
    return RowColumn(r, c, torch.randint(2, shape, generator=g).float() * 2 - 1)


def layer(*, train_codes: bool, bias: bool = True, seed: int = 0) -> LatentBinaryLinear:
    g = torch.Generator().manual_seed(seed + 1)
    confidence = torch.rand(N, K, generator=g) if train_codes else None
    return LatentBinaryLinear(solution(seed), torch.randn(N, generator=g) if bias else None, train_codes, confidence)


def inputs(seed: int = 7) -> Tensor:
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_codes", [True, False])
def test_forward_is_the_packed_layers(train_codes: bool, bias: bool) -> None:
    latent = layer(train_codes=train_codes, bias=bias)
    packed = latent.pack()
    expected = nn.functional.linear(inputs(), packed.dequantize(), packed.bias)
    torch.testing.assert_close(latent(inputs()), expected)
    torch.testing.assert_close(latent(inputs()), packed(inputs()))
    assert (packed.bias is not None) == bias
    assert latent(inputs()).shape == (2, 3, N)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_codes", [True, False])
def test_gradients_are_the_dense_formulas(train_codes: bool, bias: bool) -> None:
    """In float64 against y = x (diag(r) B diag(c))^T + b; straight-through means dL/dv = dL/dB."""
    latent = layer(train_codes=train_codes, bias=bias).double()
    x, probe = inputs().double().requires_grad_(), torch.randn(2, 3, N, dtype=torch.float64)
    (latent(x).tanh() * probe).sum().backward()

    r, c, B = (t.double().requires_grad_() for t in vars(solution()).values())
    dense_x = inputs().double().requires_grad_()
    y = dense_x @ (torch.diag(r) @ B @ torch.diag(c)).T
    if latent.bias is not None:
        y = y + latent.bias
    (y.tanh() * probe).sum().backward()

    for mine, dense in ((latent.r, r), (latent.c, c), (x, dense_x)):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, dense.grad)
        assert float(mine.grad.abs().min()) > 0
    if train_codes:
        torch.testing.assert_close(latent.v.grad, B.grad)
    else:
        assert latent.v.grad is None


def test_the_size_of_a_latent_does_not_reach_output_or_gradient() -> None:
    small, large = layer(train_codes=True), layer(train_codes=True)
    with torch.no_grad():
        large.v.mul_(1000)
    for m in (small, large):
        m(inputs()).square().sum().backward()
    assert torch.equal(small(inputs()), large(inputs()))
    assert torch.equal(small.v.grad, large.v.grad)


def test_latents_start_at_the_confidence() -> None:
    confidence = torch.rand(N, K)
    confidence[0, 0] = 0
    latent = LatentBinaryLinear(solution(), None, True, confidence)
    assert torch.equal(latent.v.sign(), solution().B)  # a code without any confidence has its sign, too
    torch.testing.assert_close(latent.v.abs()[1:], (confidence / confidence.mean())[1:])
    assert float(latent.v.detach().abs().mean()) == pytest.approx(1.0, rel=1e-5)
    zero = LatentBinaryLinear(solution(), None, True, torch.zeros(N, K))
    assert torch.equal(zero.solution().B, solution().B)


def test_what_is_trained() -> None:
    frozen, trained = layer(train_codes=False), layer(train_codes=True)
    assert {n for n, p in frozen.named_parameters() if p.requires_grad} == {"r", "c"}
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {"v", "r", "c"}
    assert torch.equal(frozen.v, solution().B)


def test_nothing_is_shared_with_what_it_was_made_from() -> None:
    s, bias = solution(), torch.ones(N)
    for confidence in (None, torch.ones(N, K)):
        latent = LatentBinaryLinear(s, bias, confidence is not None, confidence)
        packed = latent.pack()
        with torch.no_grad():
            for t in (latent.r, latent.c, latent.v):
                t.mul_(2)
            latent.bias.mul_(2)
        assert torch.equal(s.r, solution().r)
        assert torch.equal(s.c, solution().c)
        assert torch.equal(bias, torch.ones(N))
        assert torch.equal(packed.bias, torch.ones(N))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), seed=st.integers(0, 1000), codes=st.booleans())
def test_pack_and_solution_round_trip(rows: int, columns: int, seed: int, codes: bool) -> None:
    """Scales that float16 holds: packing and unpacking return the same dense weight bit for bit."""
    s = solution(seed, (rows, columns))
    latent = LatentBinaryLinear(s, None, codes)
    assert torch.equal(latent.solution().dense(), s.dense())
    packed = latent.pack()
    assert torch.equal(packed.solution().dense(), s.dense())
    again = packed.latent(train_codes=False)
    assert torch.equal(again.pack().codes, packed.codes)
    assert torch.equal(again.solution().dense(), s.dense())
    assert not again.train_codes


def test_scales_are_rounded_once_to_float16() -> None:
    latent = layer(train_codes=True)
    with torch.no_grad():
        latent.r.add_(1e-3 * torch.randn(N))
        latent.c.mul_(1.0003)
    torch.testing.assert_close(latent.pack().dequantize(), latent.solution().dense(), rtol=1.1e-3, atol=0)
    assert torch.equal(latent.pack().latent(train_codes=False).pack().row_scale, latent.pack().row_scale)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_latent_of_zero_is_plus_one_everywhere(zero: float) -> None:
    latent = layer(train_codes=True)
    minus = solution().B < 0
    with torch.no_grad():
        latent.v[minus] = zero
    assert torch.equal(latent.solution().B, torch.ones(N, K))
    # balanced() may move a scale's sign into the codes, so look at the weight
    assert torch.equal(latent.pack().dequantize(), torch.outer(latent.r, latent.c).detach())
    torch.testing.assert_close(latent(inputs()), latent.pack()(inputs()))
    latent(inputs()).sum().backward()
    assert float(latent.v.grad[minus].abs().min()) > 0  # and it can still move


def test_a_step_flips_codes_and_the_packed_layer_follows() -> None:
    latent = layer(train_codes=True)
    optimizer = torch.optim.SGD(latent.parameters(), lr=0.2)
    for _ in range(5):
        optimizer.zero_grad()
        latent(inputs()).square().mean().backward()
        optimizer.step()
    assert not torch.equal(latent.solution().B, solution().B)
    torch.testing.assert_close(latent.pack()(inputs()), latent(inputs()), rtol=1e-2, atol=1e-2)


def test_scales_that_do_not_fit_are_refused() -> None:
    latent = layer(train_codes=False)
    with torch.no_grad():
        latent.c[3] = float("nan")
    with pytest.raises(LitBinqError, match="col_scale has values that float16 cannot hold"):
        latent.pack()


@pytest.mark.parametrize("dead", [1, 12, 31])
def test_dead_columns_cost_the_others_nothing(dead: int) -> None:
    """Scales of zero, as weights pruned by columns have, must not push the others out of float16's range."""
    W = 0.02 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    W[:, :dead] = 0
    W[3] = 0
    s = RowColumnSolver().solve(Problem(W, torch.eye(32))).balanced()
    dense = BinaryLinear.from_solution(s).dequantize()
    torch.testing.assert_close(dense, s.dense(), rtol=1.1e-3, atol=0)
    assert float(dense[:, :dead].abs().max()) == float(dense[3].abs().max()) == 0
    assert float(dense.abs().max()) > 0.005


def test_a_weight_of_zeros_packs() -> None:
    s = RowColumnSolver().solve(Problem(torch.zeros(3, 4), torch.eye(4))).balanced()
    assert float(LatentBinaryLinear(s, None, False).pack().dequantize().abs().max()) == 0
