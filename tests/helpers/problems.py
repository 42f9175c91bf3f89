"""Random problems (T, H) for the tests of solvers, and f by its definition."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def problem(N: int, K: int, seed: int, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """A well-conditioned pair (T, H) in float64."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * K + 1, K, generator=g, dtype=torch.float64) @ torch.randn(K, K, generator=g).double()
    H = X.T @ X / len(X)
    H = (H + H.T) / 2 + ridge * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    return torch.randn(N, K, generator=g, dtype=torch.float64), H


def f(W: Tensor, T: Tensor, H: Tensor) -> float:
    R = (T - W).double()
    return float(((R @ H.double()) * R).sum())


shapes = {"N": st.integers(1, 6), "K": st.integers(2, 12), "seed": st.integers(0, 10_000)}
