"""The grouped format and its solver: scales against least squares, codes against brute force, f never rising."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import Grouped, GroupedLinear, grouped_binary_matmul
from lit_binq.formats.grouped import group_count, spread
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.solvers import GroupedSolver, Problem, RowColumnSolver, objective_value
from lit_binq.solvers import grouped as module
from lit_binq.solvers.grouped import start, update_scales
from lit_binq.solvers.row_column import descend_codes

groups = st.integers(1, 5).map(lambda i: 8 * i)


def problem(N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """A well-conditioned pair (T, H) in float64."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * K + 1, K, generator=g, dtype=torch.float64) @ torch.randn(K, K, generator=g).double()
    H = X.T @ X / len(X)
    H = (H + H.T) / 2 + 0.1 * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    return torch.randn(N, K, generator=g, dtype=torch.float64), H


def random_weight(N: int, K: int, group: int, seed: int, dtype: torch.dtype = torch.float64) -> Grouped:
    """Scales of either sign, random codes."""
    g = torch.Generator().manual_seed(seed + 10_000)
    s = torch.randn(N, group_count(K, group), generator=g, dtype=dtype)
    return Grouped(s, torch.randint(2, (N, K), generator=g).to(dtype) * 2 - 1, group)


# --- format


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 20), K=st.integers(1, 70), group=groups, seed=st.integers(0, 1000), bias=st.booleans())
def test_layer_computes_with_what_it_stores(N: int, K: int, group: int, seed: int, bias: bool) -> None:
    s = random_weight(N, K, group, seed, torch.float32)
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(N, generator=g) if bias else None
    layer = s.pack(b)
    x = torch.randn(2, 3, K, generator=g)
    W = layer.dequantize()
    expected = torch.nn.functional.linear(x.double(), W.double(), None if b is None else b.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(W, s.dense(), rtol=1e-3, atol=1e-7)  # float16 scales
    assert float(layer.scales.min()) >= 0  # signs of scales are in the codes
    for i in range(N):
        for j in range(K):
            assert abs(float(W[i, j])) == float(layer.scales[i, j // group])


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 20), K=st.integers(1, 70), group=groups, bias=st.booleans())
def test_true_bits_count_every_stored_byte(N: int, K: int, group: int, bias: bool) -> None:
    layer = GroupedLinear(K, N, bias, group=group)
    state = {name: t for name, t in layer.state_dict().items() if name != "bias"}
    assert layer.stored_bits() == 8 * sum(t.nbytes for t in state.values())
    assert layer.stored_bits() == 8 * N * -(-K // 8) + 16 * N * -(-K // group)


def test_true_bits_of_a_real_shape() -> None:
    assert GroupedLinear(1536, 576, group=128).true_bits() == 1.125
    assert GroupedLinear(576, 576, group=64).true_bits() == 1.25


def test_state_round_trip_into_an_empty_layer() -> None:
    linear = nn.Linear(37, 7)
    layer = random_weight(7, 37, 16, 0, torch.float32).pack(linear.bias.detach())
    entry = describe_layer(layer)
    assert entry == {"format": "grouped", "group": 16}
    empty = empty_layer(linear, entry)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(empty(x), layer(x))
    for broken in ({"format": "grouped"}, {"format": "grouped", "group": 7}, {"format": "grouped", "rank": 8}):
        with pytest.raises(LitBinqError):
            empty_layer(linear, broken)


@pytest.mark.parametrize("group", [0, 4, 12, 2048, -8])
def test_group_sizes_that_no_operator_takes(group: int) -> None:
    with pytest.raises(LitBinqError, match=rf"solver.group: got {group}, expected a multiple of 8 from 8 to 1024"):
        GroupedSolver(group=group)
    with pytest.raises(LitBinqError, match=rf"group: got {group}"):
        GroupedLinear(16, 16, group=group)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_scales_that_do_not_fit_are_refused(bad: float) -> None:
    s = random_weight(3, 16, 8, 0)
    s.s[1, 1] = bad
    with pytest.raises(LitBinqError, match="scales has values that float16 cannot hold"):
        s.pack()


def test_the_custom_operator_is_well_formed() -> None:
    layer = random_weight(5, 21, 8, 0, torch.float32).pack(torch.ones(5))
    arguments = (torch.randn(2, 21), layer.codes, layer.scales, layer.bias, 21, 8)
    torch.library.opcheck(
        grouped_binary_matmul, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


# --- trainable layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_codes", [False, True])
def test_gradients_are_the_dense_formulas(train_codes: bool, bias: bool) -> None:
    s = random_weight(5, 19, 8, 0)
    latent = s.pack(torch.ones(5) if bias else None).latent(train_codes, torch.rand(5, 19)).double()
    g = torch.Generator().manual_seed(1)
    x, probe = torch.randn(7, 19, generator=g).double(), torch.randn(7, 5, generator=g).double()
    (latent(x).tanh() * probe).sum().backward()
    scales, B = (t.double().requires_grad_() for t in (latent.solution().s, latent.solution().B))
    y = x @ (B * spread(scales, 19, 8)).T
    ((y + 1 if bias else y).tanh() * probe).sum().backward()
    torch.testing.assert_close(latent.s.grad, scales.grad)
    assert float(scales.grad.abs().min()) > 0
    if train_codes:
        torch.testing.assert_close(latent.v.grad, B.grad)
        assert latent.code_parameters() == [latent.v]
    else:
        assert latent.v.grad is None
        assert latent.code_parameters() == []
    assert latent.scale_parameters() == [latent.s]


def test_a_step_flips_codes_and_the_packed_layer_follows() -> None:
    layer = random_weight(5, 19, 8, 0, torch.float32).pack()
    latent = layer.latent(True)
    x = torch.randn(30, 19, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(latent.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        latent(x).square().mean().backward()
        optimizer.step()
    packed = latent.pack()
    assert not torch.equal(packed.codes, layer.codes)
    torch.testing.assert_close(packed(x), latent(x), rtol=1e-2, atol=1e-2)


# --- solver


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 6), K=st.integers(1, 40), group=groups, seed=st.integers(0, 10_000))
def test_scales_are_the_least_squares_solution(N: int, K: int, group: int, seed: int) -> None:
    """Row by row: L^T E_i^T s ~ L^T t_i with H = L L^T."""
    (T, H), s = problem(N, K, seed), random_weight(N, K, group, seed)
    new = update_scales(s, T @ H, H)
    Lt = torch.linalg.cholesky(H).T
    G = group_count(K, group)
    for i in range(N):
        E = torch.zeros(G, K, dtype=torch.float64)
        E[torch.arange(K) // group, torch.arange(K)] = s.B[i]
        exact = torch.linalg.lstsq(Lt @ E.T, (Lt @ T[i])[:, None]).solution[:, 0]
        # the ridge of 1e-8 of the mean moves them by this much at most
        torch.testing.assert_close(new.s[i], exact, rtol=1e-4, atol=1e-4)
    assert objective_value(new, T, H) <= objective_value(s, T, H) * (1 + 1e-12)


def test_a_ridge_that_would_hurt_is_refused() -> None:
    """Scales that fit exactly, one of them in a direction as weak as the ridge: they stay what they are."""
    s = random_weight(3, 16, 8, 0)
    H = torch.diag(torch.tensor([1.0] * 8 + [1e-8] * 8, dtype=torch.float64))
    assert torch.equal(update_scales(s, s.dense() @ H, H).s, s.s)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (T, H), s = problem(11, 40, 0), random_weight(11, 40, 8, 0)
    whole = update_scales(s, T @ H, H)
    monkeypatch.setattr(module, "WORKING_BYTES", 3 * 8 * (2 * 25 + 160))
    torch.testing.assert_close(update_scales(s, T @ H, H).s, whole.s, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 4), K=st.integers(1, 20), group=groups, seed=st.integers(0, 10_000))
def test_after_enough_sweeps_no_single_flip_helps(N: int, K: int, group: int, seed: int) -> None:
    (T, H), s = problem(N, K, seed), random_weight(N, K, group, seed)
    B = descend_codes(s.B, spread(s.s, K, group).T, T @ H, H, sweeps=50)
    best = objective_value(Grouped(s.s, B, group), T, H)
    for i in range(N):
        for j in range(K):
            other = B.clone()
            other[i, j] *= -1
            assert objective_value(Grouped(s.s, other, group), T, H) >= best * (1 - 1e-12)


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 12), K=st.integers(1, 60), group=groups, seed=st.integers(0, 10_000))
def test_the_objective_never_rises(N: int, K: int, group: int, seed: int) -> None:
    T, H = problem(N, K, seed)
    values = [objective_value(GroupedSolver(group, rounds).solve(Problem(T, H)), T, H) for rounds in range(5)]
    assert values[0] == objective_value(start(T, group), T, H)
    for before, after in itertools.pairwise(values):
        assert after <= before * (1 + 1e-10) + 1e-12 * float(((T @ H) * T).sum())


def test_smaller_groups_fit_better() -> None:
    T, H = (t.float() for t in problem(40, 256, 0))
    values = [objective_value(GroupedSolver(group, rounds=3).solve(Problem(T, H)), T, H) for group in (256, 64, 16, 8)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]
    assert values[2] < objective_value(RowColumnSolver(rounds=3).solve(Problem(T, H)), T, H)


@pytest.mark.parametrize("dead", [1, 8, 31])
def test_singular_metrics_and_dead_columns(dead: int) -> None:
    """A metric of rank 3, and columns that are zero in metric and target."""
    g = torch.Generator().manual_seed(0)
    X, T = torch.randn(3, 32, generator=g), 0.02 * torch.randn(16, 32, generator=g)
    X[:, :dead], T[:, :dead], T[3] = 0, 0, 0
    H = X.T @ X
    before = objective_value(start(T, 8), T, H)
    s = GroupedSolver(8).solve(Problem(T, H))
    assert torch.isfinite(s.pack().dequantize()).all()
    assert objective_value(s, T, H) <= before


def test_a_weight_of_zeros_and_bad_input() -> None:
    zero = GroupedSolver(8).solve(Problem(torch.zeros(3, 20), torch.eye(20)))
    assert float(zero.pack().dequantize().abs().max()) == 0
    T = torch.ones(3, 20)
    T[0, 0] = float("nan")
    with pytest.raises(LitBinqError, match="NaN or inf"):
        GroupedSolver(8).solve(Problem(T, torch.eye(20)))
    with pytest.raises(LitBinqError, match=r"solver\.rounds: got -1"):
        GroupedSolver(rounds=-1)
