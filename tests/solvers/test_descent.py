"""The panels of coordinate descent: nothing but the order of sums depends on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.solvers.descent import Step, descend_columns
from problems import problem


def plain(W: Tensor, TH: Tensor, H: Tensor, step: Step) -> Tensor:
    """One pass that computes the whole residual anew for every column. W and TH are (K, N)."""
    W = W.clone()
    for j in range(len(W)):
        out = torch.full_like(W[j], torch.nan)
        step(j, W[j].clone(), (TH - H @ W)[j], out)
        W[j] = out
    return W


def steps(H: Tensor) -> dict[str, Step]:
    over = 1 / H.diagonal()

    def best(j: int, weights: Tensor, residual: Tensor, out: Tensor) -> None:
        torch.add(weights, residual * over[j], out=out)

    def halves(j: int, weights: Tensor, residual: Tensor, out: Tensor) -> None:
        torch.round(2 * (weights + residual * over[j]), out=out).div_(2)

    return {"best": best, "halves": halves}


@pytest.mark.parametrize("kind", ["best", "halves"])
@settings(deadline=None, max_examples=30)
@given(
    N=st.integers(1, 5),
    K=st.integers(1, 40),
    seed=st.integers(0, 1000),
    inner=st.integers(1, 12),
    outer=st.integers(1, 40),
)
def test_a_pass_is_the_plain_pass(kind: str, N: int, K: int, seed: int, inner: int, outer: int) -> None:
    T, H = problem(N, K, seed)
    start = torch.randn(K, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    W, G = start.clone(), (T @ H).T - H @ start
    new = descend_columns(W, G, H, steps(H)[kind], inner=inner, outer=outer)
    torch.testing.assert_close(new, plain(start, (T @ H).T, H, steps(H)[kind]), rtol=1e-7, atol=1e-7)
    assert torch.equal(W, start)
    torch.testing.assert_close(G, (T @ H).T - H @ new, rtol=1e-7, atol=1e-7)  # for the next pass


def test_the_residual_is_kept_for_further_passes() -> None:
    T, H = problem(3, 50, 0)
    W = torch.zeros(50, 3, dtype=torch.float64)
    G = (T @ H).T.contiguous()
    for _ in range(3):
        W = descend_columns(W, G, H, steps(H)["best"], inner=4, outer=12)
        torch.testing.assert_close(G, (T @ H).T - H @ W, rtol=1e-8, atol=1e-8)
