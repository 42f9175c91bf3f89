"""The low-rank format and its solver: budgets, exact scales, an objective that never rises, weights it can recover."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_binq.errors import LitBinqError
from lit_binq.formats import LowRank, LowRankLinear
from lit_binq.formats.low_rank import stored_bits
from lit_binq.formats.registry import describe_layer, empty_layer
from lit_binq.solvers import LowRankSolver, Problem, objective_value
from lit_binq.solvers.low_rank import most_rank, rotate_to_signs, svd_start, update_left, update_right, update_scales

ranks = st.integers(1, 4).map(lambda i: 8 * i)


def problem(N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """A well-conditioned pair (T, H) in float64."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * K + 1, K, generator=g, dtype=torch.float64) @ torch.randn(K, K, generator=g).double()
    H = X.T @ X / len(X)
    H = (H + H.T) / 2 + 0.1 * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    return torch.randn(N, K, generator=g, dtype=torch.float64), H


def random_weight(N: int, K: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    """Scales of either sign, random codes."""
    g = torch.Generator().manual_seed(seed + 10_000)
    u, v, w = (torch.randn(n, generator=g, dtype=dtype) for n in (N, k, K))
    A, B = (torch.randint(2, shape, generator=g).to(dtype) * 2 - 1 for shape in ((N, k), (k, K)))
    return LowRank(u, A, v, B, w)


# --- format


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 20), K=st.integers(1, 40), k=ranks, seed=st.integers(0, 1000), bias=st.booleans())
def test_layer_computes_with_what_it_stores(N: int, K: int, k: int, seed: int, bias: bool) -> None:
    s = random_weight(N, K, k, seed, torch.float32)
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(N, generator=g) if bias else None
    layer = s.pack(b)
    x = torch.randn(2, 3, K, generator=g)
    W = layer.dequantize()
    expected = torch.nn.functional.linear(x.double(), W.double(), None if b is None else b.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    size = (s.u.abs()[:, None] * s.v.abs().sum()) * s.w.abs()
    assert bool(((W - s.dense()).abs() <= 2e-3 * size + 1e-6).all())  # three float16 roundings


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 20), K=st.integers(1, 40), k=ranks, power=st.integers(-20, 20), seed=st.integers(0, 1000))
def test_balancing_keeps_the_weight(N: int, K: int, k: int, power: int, seed: int) -> None:
    s = random_weight(N, K, k, seed)
    s = LowRank(s.u * 2.0**power, s.A, s.v, s.B, s.w / 2.0**power)
    balanced = s.balanced()
    assert torch.equal(balanced.dense(), s.dense())  # powers of two and signs move, nothing rounds
    means = [float(t.log2().mean()) for t in (balanced.u, balanced.v, balanced.w)]
    assert max(means) - min(means) <= 2.0 + 1e-6


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 40), K=st.integers(1, 40), k=ranks, bias=st.booleans())
def test_true_bits_count_every_stored_byte(N: int, K: int, k: int, bias: bool) -> None:
    """The ones of the second product are no stored tensor."""
    layer = LowRankLinear(K, N, bias, rank=k)
    state = {name: t for name, t in layer.state_dict().items() if name != "bias"}
    assert "ones" not in state
    assert layer.stored_bits() == 8 * sum(t.nbytes for t in state.values()) == stored_bits(N, K, k)


def test_state_round_trip_into_an_empty_layer() -> None:
    linear = nn.Linear(37, 11)
    layer = random_weight(11, 37, 16, 0, torch.float32).pack(linear.bias.detach())
    assert describe_layer(layer) == {"format": "low_rank", "rank": 16}
    empty = empty_layer(linear, describe_layer(layer))
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(empty(x), layer(x))
    for rank in (0, 4, 12, -8):
        words = f"rank {rank}, expected a multiple of 8" if rank >= 0 else "'rank' is -8, expected a whole number"
        with pytest.raises(LitBinqError, match=words):
            empty_layer(linear, {"format": "low_rank", "rank": rank})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_scales_that_do_not_fit_are_refused(bad: float) -> None:
    s = random_weight(3, 16, 8, 0)
    s.w[1] = bad
    with pytest.raises(LitBinqError, match="scale has values that float16 cannot hold"):
        s.pack()


# --- trainable layer


@pytest.mark.parametrize("train_codes", [False, True])
def test_gradients_are_the_dense_formulas(train_codes: bool) -> None:
    layer = random_weight(5, 19, 8, 0).pack(torch.ones(5))
    latent = layer.latent(train_codes, torch.randn(5, 19)).double()
    g = torch.Generator().manual_seed(1)
    x, probe = torch.randn(7, 19, generator=g).double(), torch.randn(7, 5, generator=g).double()
    (latent(x).tanh() * probe).sum().backward()
    u, A, v, B, w = (t.double().requires_grad_() for t in vars(layer.solution()).values())
    y = x @ (torch.diag(u) @ A @ torch.diag(v) @ B @ torch.diag(w)).T + 1
    (y.tanh() * probe).sum().backward()
    for mine, dense in zip(latent.scale_parameters(), (u, v, w), strict=True):
        torch.testing.assert_close(mine.grad, dense.grad)
        assert float(dense.grad.abs().min()) > 0
    assert latent.left.c.grad is None  # one by definition
    assert len(latent.code_parameters()) == 2 * train_codes
    for mine, dense in zip(latent.code_parameters(), (A, B), strict=False):
        torch.testing.assert_close(mine.grad, dense.grad)
    assert {p for p in latent.parameters() if p.requires_grad} == {
        *latent.code_parameters(),
        *latent.scale_parameters(),
    }


def test_both_factors_are_tuned_and_packed() -> None:
    layer = random_weight(12, 19, 8, 0, torch.float32).pack()
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(60, 19, generator=g), torch.randn(12, 19, generator=g)
    latent = layer.latent(True, target)
    for v in latent.code_parameters():
        assert float(v.detach().abs().mean()) == pytest.approx(1.0, rel=1e-4)
    optimizer = torch.optim.Adam([*latent.code_parameters(), *latent.scale_parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (latent(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    packed = latent.pack()
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(packed.left_codes, layer.left_codes)
    assert not torch.equal(packed.right_codes, layer.right_codes)
    torch.testing.assert_close(packed(x), latent(x), rtol=1e-2, atol=3e-2)


# --- solver


@settings(deadline=None, max_examples=60)
@given(N=st.integers(30, 5000), K=st.integers(30, 5000), bits=st.floats(0.1, 2.0))
def test_ranks_use_a_budget_up(N: int, K: int, bits: float) -> None:
    if stored_bits(N, K, 8) > bits * N * K:
        with pytest.raises(LitBinqError, match="expected at least"):
            most_rank(N, K, bits)
        return
    k = most_rank(N, K, bits)
    assert k % 8 == 0
    assert stored_bits(N, K, k) <= bits * N * K < stored_bits(N, K, k + 8)


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (80, 256)])
def test_weights_keep_to_their_budget(bits: float, shape: tuple[int, int]) -> None:
    """Above one bit the rank passes min(N, K)."""
    T, H = (t.float() for t in problem(*shape, 0))
    s = LowRankSolver(rounds=1).solve(Problem(T, H, bits=bits))
    assert bits - 0.25 < s.pack().true_bits() <= bits
    assert torch.isfinite(s.dense()).all()


def test_more_bits_fit_better() -> None:
    T, H = problem(64, 96, 0)
    values = [objective_value(LowRankSolver().solve(Problem(T, H, bits=bits)), T, H) for bits in (0.7, 1.0, 1.5, 2.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.6 * values[0]


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 16), K=st.integers(1, 30), k=ranks, panels=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_no_step_raises_the_objective(N: int, K: int, k: int, panels: int, seed: int) -> None:
    (T, H), s = problem(N, K, seed), random_weight(N, K, k, seed)
    TH, constant = T @ H, float(((T @ H) * T).sum())
    f = objective_value(s, T, H)
    for step in (
        lambda s: update_left(s, TH, H, sweeps=1),
        lambda s: update_right(s, TH, H, sweeps=1, panels=panels),
        lambda s: update_scales(s, TH, H),
    ) * 2:
        s = step(s)
        after = objective_value(s, T, H)
        assert after <= f * (1 + 1e-9) + 1e-9 * constant
        f = after


@pytest.mark.slow
def test_the_right_factor_moves() -> None:
    """A bound that is too wide would freeze every code and still never raise f."""
    (T, H), s = problem(40, 60, 0), random_weight(40, 60, 16, 0)
    s = update_scales(s, T @ H, H)
    before = objective_value(s, T, H)
    new = update_right(s, T @ H, H, sweeps=1, panels=4)
    assert float((new.B != s.B).double().mean()) > 0.1
    assert objective_value(new, T, H) < before
    for i in (0, 7, 15):  # rows of one panel each: the bound is f itself, so a row ends where no flip helps
        single = update_right(s, T @ H, H, sweeps=50, panels=16)
        best = objective_value(single, T, H)
        if i == 15:  # the last row: nothing moved after it
            for j in range(60):
                B = single.B.clone()
                B[i, j] *= -1
                other = LowRank(single.u, single.A, single.v, B, single.w)
                assert objective_value(other, T, H) >= best * (1 - 1e-6)


def test_the_start_is_the_best_rank_in_the_metric() -> None:
    """Before the signs: no weight of rank k is closer, whatever the metric."""
    from lit_binq.solvers.low_rank import _factors

    T, H = problem(20, 30, 0)
    X, Y = _factors(T, H, 8)
    R = T - X @ Y
    found = float(((R @ H) * R).sum())
    L = torch.linalg.cholesky(H)
    best = float(torch.linalg.svdvals(T @ L)[8:].square().sum())
    assert found == pytest.approx(best, rel=1e-6)
    X, Y = _factors(T, H, 40)  # more than there are directions
    assert X.shape == (20, 40)
    torch.testing.assert_close(X @ Y, T)


def test_rotating_helps_and_the_seed_decides() -> None:
    T, H = problem(64, 96, 0)
    f = {r: objective_value(svd_start(T, H, 32, rotations=r), T, H) for r in (0, 30)}
    assert f[30] < 0.97 * f[0]
    same = [svd_start(T, H, 32, rotations=3, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(same[0].A, same[1].A)
    assert not torch.equal(same[0].A, same[2].A)


def test_every_rotation_brings_rows_closer_to_signs() -> None:
    g = torch.Generator().manual_seed(0)
    Z = torch.nn.functional.normalize(torch.randn(80, 24, generator=g, dtype=torch.float64), dim=1)
    rotations = [rotate_to_signs(Z, steps, seed=1) for steps in range(12)]
    for O in rotations:  # noqa: E741  # as in the solver's legend
        torch.testing.assert_close(O @ O.T, torch.eye(24, dtype=torch.float64))
    sizes = [float((Z @ O).abs().sum()) for O in rotations]  # noqa: E741  # as above
    assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(sizes))
    assert sizes[-1] > 1.03 * sizes[0]


def test_a_low_rank_binary_weight_is_nearly_recovered() -> None:
    s = random_weight(64, 96, 8, 0)
    T = LowRank(s.u.abs() + 0.5, s.A, torch.ones(8).double(), s.B, s.w.abs() + 0.5).dense()
    _, H = problem(64, 96, 1)
    relative = objective_value(LowRankSolver(rank=8, rounds=10).solve(Problem(T, H)), T, H) / float(((T @ H) * T).sum())
    assert relative < 0.25


@pytest.mark.parametrize("kind", ["zero", "singular", "dead columns"])
def test_poor_systems(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    T, H = torch.randn(24, 32, generator=g), torch.eye(32)
    if kind == "zero":
        T = torch.zeros(24, 32)
    elif kind == "singular":
        X = torch.randn(3, 32, generator=g)
        H = X.T @ X
    else:
        T[:, :9], H[:9, :9], T[3] = 0, 1e-12 * torch.eye(9), 0
    W = LowRankSolver(rank=16).solve(Problem(T, H)).pack().dequantize()
    assert torch.isfinite(W).all()
    R = T - W
    assert float(((R @ H) * R).sum()) <= 1.001 * float(((T @ H) * T).sum())


def test_options() -> None:
    T, H = problem(64, 64, 0)
    assert LowRankSolver(rounds=0).solve(Problem(T, H)).pack().true_bits() <= 1.0
    assert len(LowRankSolver(rank=24, rounds=0).solve(Problem(T, H)).v) == 24
    assert len(LowRankSolver(rank=24, rounds=0).solve(Problem(T, H, bits=1.2)).v) == most_rank(64, 64, 1.2)
    with pytest.raises(LitBinqError, match=r"solver\.rank: got 12, expected a multiple of 8"):
        LowRankSolver(rank=12)
    with pytest.raises(LitBinqError, match=r"solver\.rounds: got -1, expected a number >= 0"):
        LowRankSolver(rounds=-1)
    with pytest.raises(LitBinqError, match=r"got 0\.1000 for a 64 x 64 layer, expected at least 0\.7812"):
        LowRankSolver().solve(Problem(T, H, bits=0.1))
    T[0, 0] = float("inf")
    with pytest.raises(LitBinqError, match="NaN or inf"):
        LowRankSolver().solve(Problem(T, H))
