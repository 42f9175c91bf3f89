"""The AMP gate against its definition and brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats import RowColumn
from lit_binq.solvers import (
    OutputAlignment,
    Problem,
    RowColumnSolver,
    objective_value,
    row_column,
)
from lit_binq.solvers.baselines import amp as amp_gate
from lit_binq.solvers.baselines.amp import amp_metric
from problems import f

# ---- AMP -----------------------------------------------------------------------------------------------------------


def amp_problem(N: int, K: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """T, H and M from two streams and a weight, float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * K, K, generator=g, dtype=torch.float64) @ torch.randn(K, K, generator=g).double()
    x_tilde = x + 0.5 * torch.randn(4 * K, K, generator=g).double()
    W = torch.randn(N, K, generator=g, dtype=torch.float64)
    S, C = x_tilde.T @ x_tilde / len(x), x.T @ x_tilde / len(x)
    return W @ C @ torch.linalg.inv(S), S, amp_metric(W, C)


def aligned(s: RowColumn, M: Tensor) -> float:
    W = s.dense().double()
    return float(((W @ M.double()) * W).sum())


def test_the_amp_metric_measures_token_grams() -> None:
    """tr(W^ M W^^T) is, up to a factor, <Y Y^T, Y^ Y^^T> of the outputs of all tokens."""
    g = torch.Generator().manual_seed(0)
    x, x_tilde = (torch.randn(50, 6, generator=g, dtype=torch.float64) for _ in range(2))
    W, A, B = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(3))
    M = amp_metric(W, x.T @ x_tilde / 50)
    direct, ours = [], []
    for other in (A, B):
        Y, Y_hat = x @ W.T, x_tilde @ other.T
        direct.append(float(((Y @ Y.T) * (Y_hat @ Y_hat.T)).sum()))
        ours.append(float(((other @ M) * other).sum()))
    assert direct[0] / direct[1] == pytest.approx(ours[0] / ours[1])
    with pytest.raises(LitBinqError, match=r"set `closed_form.objective: true_target`"):
        amp_metric(W, torch.zeros(6, 6))


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 5), K=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_no_gated_update_lowers_the_alignment_or_raises_f(N: int, K: int, seed: int) -> None:
    T, H, M = amp_problem(N, K, seed)
    TH = T @ H
    s = row_column.start(T, 10)
    s = RowColumn(s.r, s.c, s.B.double())
    for _ in range(3):
        for name in ("codes", "rows", "columns"):
            if name == "codes":
                new = amp_gate.gated_codes(s, TH, H, M, width=3)
            elif name == "rows":
                new = amp_gate.gate_rows(s, row_column.update_row_scales(s, TH, H), M)
            else:
                new = amp_gate.gate_columns(s, row_column.update_column_scales(s, TH, H), TH, H, M)
            assert aligned(new, M) >= aligned(s, M) * (1 - 1e-9), name
            assert f(new.dense(), T, H) <= f(s.dense(), T, H) * (1 + 1e-9) + 1e-9 * f(0 * T, T, H), name
            s = new


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 4), K=st.integers(1, 8), seed=st.integers(0, 10_000), width=st.sampled_from([1, 3, 32]))
def test_gated_codes_are_those_of_brute_force(N: int, K: int, seed: int, width: int) -> None:
    T, H, M = amp_problem(N, K, seed)
    s = row_column.start(T, 3)
    s = RowColumn(s.r, s.c, torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).sign().double())
    found = amp_gate.gated_codes(s, T @ H, H, M, sweeps=2, width=width)
    B = s.B.clone()
    for _ in range(2):
        for j, i in itertools.product(range(K), range(N)):
            here, flipped = (RowColumn(s.r, s.c, b) for b in (B, B.clone()))
            flipped.B[i, j] *= -1
            lowers_f = f(flipped.dense(), T, H) < f(here.dense(), T, H)
            if lowers_f and aligned(flipped, M) >= aligned(here, M):
                B = flipped.B
    assert torch.equal(found.B, B)


def test_the_gate_stands_open_where_nothing_is_aligned() -> None:
    T, H = (t.float() for t in amp_problem(8, 12, 0)[:2])
    gated = OutputAlignment()._gated(T, H, torch.zeros(12, 12))
    torch.testing.assert_close(gated.dense(), RowColumnSolver().solve(Problem(T, H)).dense())


def test_the_gate_closes() -> None:
    """It changes what is found, still better than the start, and never aligned less than it."""
    closed = 0
    for seed in range(10):
        T, H, M = (t.float() for t in amp_problem(8, 12, seed))
        begin = aligned(RowColumnSolver(rounds=0).solve(Problem(T, H)), M)
        free, gated = RowColumnSolver().solve(Problem(T, H)), OutputAlignment()._gated(T, H, M)
        assert aligned(gated, M) >= begin * (1 - 1e-6)
        assert objective_value(gated, T, H) <= objective_value(RowColumnSolver(rounds=0).solve(Problem(T, H)), T, H)
        closed += not torch.equal(free.dense(), gated.dense())
    assert closed > 5
