"""ARB, ARB-RC and ARB-X, and the error-feedback start, against brute force and least squares."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.solvers import (
    ARB,
    ARBRC,
    ARBX,
    Problem,
    RowColumnSolver,
    objective_value,
)
from lit_binq.solvers.baselines import arb
from lit_binq.solvers.baselines.arb import RowMean
from lit_binq.solvers.baselines.arb_x import align
from lit_binq.solvers.row_column import start
from lit_binq.statistics.error_feedback import column_by_column, inverse_factor
from problems import f, problem, shapes

# ---- ARB, ARB-RC, ARB-X --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_no_step_of_arb_raises_its_error(N: int, K: int, seed: int) -> None:
    T, _ = problem(N, K, seed)
    s, eye = arb.start(T), torch.eye(K)
    before = f(s.dense(), T, eye)
    for _ in range(8):
        new = arb.update(s, T)
        mean_alone = RowMean(new.m, s.a, s.B)
        sizes_too = RowMean(new.m, new.a, s.B)
        for step in (mean_alone, sizes_too, new):
            now = f(step.dense(), T, eye)
            assert now <= before * (1 + 1e-12) + 1e-12
            before = now
        # each the exact minimiser: mean and size against least squares, signs against both choices
        for i in range(N):
            rest = T[i] - s.a[i] * s.B[i]
            assert float(new.m[i]) == pytest.approx(float(rest.mean()), abs=1e-12)
            size = torch.linalg.lstsq(s.B[i][:, None], (T[i] - new.m[i])[:, None]).solution
            assert float(new.a[i]) == pytest.approx(float(size), abs=1e-9)
        levels = torch.stack([new.m[:, None] + b * new.a[:, None] * torch.ones_like(T) for b in (-1, 1)])
        best = (T - levels).abs().amin(0)
        torch.testing.assert_close((T - new.dense()).abs(), best)
        s = new


def test_arb_moves_and_ends_where_nothing_helps() -> None:
    T = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) ** 3 + 0.5
    eye = torch.eye(40)
    errors = [f(arb.alternate(T, n).dense(), T, eye) for n in (0, 1, 15, 200)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    s = arb.alternate(T, 200)
    torch.testing.assert_close(arb.update(s, T).dense(), s.dense(), rtol=1e-4, atol=1e-5)


def test_the_start_of_arb_is_xnor() -> None:
    T = problem(5, 9, 0)[0].float()
    s = arb.start(T)
    mean = T.mean(1, keepdim=True)
    expected = mean + (T - mean).abs().mean(1, keepdim=True) * (T - mean).sign()
    torch.testing.assert_close(s.dense(), expected)


def test_arb_rc_is_the_row_column_solver_before_its_rounds() -> None:
    T, H = (t.float() for t in problem(8, 12, 1))
    assert torch.equal(ARBRC().solve(Problem(T, H)).dense(), start(T, 15).dense())
    eye = torch.eye(12)
    errors = [f(start(T, n).dense(), T, eye) for n in range(12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    # for H = I there is nothing better to be found for these codes, and they are the best
    full = RowColumnSolver(rounds=3).solve(Problem(T, eye))
    assert objective_value(full, T, eye) == pytest.approx(errors[-1], rel=1e-3)
    assert torch.equal(full.B * full.r.sign()[:, None] * full.c.sign(), torch.where(T >= 0, 1.0, -1.0))


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_arb_x_ends_at_the_least_squares_mean_and_size(N: int, K: int, seed: int) -> None:
    T, H = (t.float() for t in problem(N, K, seed))
    weight = ARB().solve(Problem(T, H))
    s, codes = align(weight, T, H, 3000), weight.B
    assert torch.equal(s.B, codes)
    Lt = torch.linalg.cholesky(H.double()).T
    for i in range(N):
        columns = torch.stack((torch.ones(K).double(), codes[i].double()), 1)
        best = torch.linalg.lstsq(Lt @ columns, Lt @ T[i].double()[:, None], driver="gelsd").solution
        optimum = f((columns @ best).T, T[i : i + 1], H)
        assert f(s.dense()[i : i + 1], T[i : i + 1], H) <= optimum * (1 + 1e-4) + 1e-6


def test_no_round_of_arb_x_raises_f_and_it_beats_arb_under_h() -> None:
    T, H = (t.float() for t in problem(9, 20, 4))
    weight = ARB().solve(Problem(T, H))
    values = [objective_value(align(weight, T, H, n), T, H) for n in range(10)]
    assert objective_value(ARBX().solve(Problem(T, H)), T, H) <= values[-1] * (1 + 1e-6)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(values))
    assert values[-1] < 0.99 * values[0]


def test_arb_x_under_the_identity_is_arb() -> None:
    """Once ARB has come to rest, its mean and size are the least-squares ones."""
    T = torch.randn(7, 30, generator=torch.Generator().manual_seed(2))
    eye = torch.eye(30)
    weight = arb.alternate(T, 300)
    torch.testing.assert_close(align(weight, T, eye, 15).dense(), weight.dense(), rtol=1e-4, atol=1e-5)


# ---- error feedback ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 4), K=st.integers(1, 12), seed=st.integers(0, 10_000), width=st.sampled_from([1, 3, 128]))
def test_error_feedback_leaves_the_best_columns_to_come(N: int, K: int, seed: int, width: int) -> None:
    T, H = problem(N, K, seed)
    U = inverse_factor(H)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H))
    seen: list[Tensor] = []
    errors = torch.zeros((), dtype=torch.float64)

    def quantize(w: Tensor, j: int) -> Tensor:
        nonlocal errors
        done = torch.stack(seen, 1) if seen else T[:, :0]
        # the minimiser over columns j.. given those before: T_2 + (T_1 - Q_1) H_12 H_22^-1
        best = T[:, j:] + (T[:, :j] - done) @ H[:j, j:] @ torch.linalg.inv(H[j:, j:])
        torch.testing.assert_close(w, best[:, 0], rtol=1e-6, atol=1e-6)
        q = torch.where(w >= 0, 0.7, -0.7).double()
        errors = errors + ((w - q) / U[j, j]).square().sum()
        seen.append(q)
        return q

    Q = column_by_column(T, U, quantize, width=width)
    assert torch.equal(Q, torch.stack(seen, 1))
    assert f(Q, T, H) == pytest.approx(float(errors), rel=1e-6)


def test_a_metric_that_cannot_be_inverted() -> None:
    H = torch.zeros(6, 6)
    H[0, 0] = 1.0
    U = inverse_factor(H, 0.01)  # damped
    assert torch.isfinite(U).all()
    assert torch.isfinite(inverse_factor(torch.ones(6, 6))).all()  # damping is raised until it works
    with pytest.raises(LitBinqError, match="cannot be inverted"):
        inverse_factor(-torch.eye(6))
