"""Distances between tensors against plain re-computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.diagnostics.similarity import (
    attention_divergence,
    effective_rank,
    token_similarity,
    token_similarity_error,
)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), T=st.integers(1, 6), N=st.integers(1, 5), scale=st.floats(1e-3, 1e3))
def test_token_similarity_is_cosines_between_tokens(seed, T, N, scale):
    g = torch.Generator().manual_seed(seed)
    y, y_hat = scale * torch.randn(T, N, generator=g), torch.randn(T, N, generator=g)

    def cosines(rows):
        return [[sum(a * b for a, b in zip(p, q, strict=True)) / math.hypot(*p) / math.hypot(*q) for q in rows]
                for p in rows]  # fmt: skip

    G, G_hat = cosines(y.tolist()), cosines(y_hat.tolist())
    torch.testing.assert_close(token_similarity(y), torch.tensor(G), atol=1e-5, rtol=1e-4)
    error = math.sqrt(sum((a - b) ** 2 for p, q in zip(G_hat, G, strict=True) for a, b in zip(p, q, strict=True)))
    assert float(token_similarity_error(y_hat, y)) == pytest.approx(error, rel=1e-4, abs=1e-5)
    assert float(token_similarity_error(3 * y, y)) == pytest.approx(0, abs=1e-5)


def test_a_zero_token_is_similar_to_none():
    y = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert token_similarity(y).tolist() == [[0, 0], [0, 1]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 12), width=st.integers(1, 8), scale=st.floats(1e-4, 1e4))
def test_effective_rank_against_singular_values(seed, tokens, width, scale):
    g = torch.Generator().manual_seed(seed)
    Y = scale * torch.randn(tokens, width, generator=g, dtype=torch.float64)
    p = torch.linalg.svdvals(Y)
    p = (p / p.sum()).tolist()
    expected = math.exp(-sum(v * math.log(v) for v in p if v > 0))
    assert float(effective_rank(Y.T @ Y)) == pytest.approx(expected, rel=1e-4)
    assert float(effective_rank(Y.T @ Y)) * (1 + 1e-9) >= 1
    assert float(effective_rank(Y.T @ Y)) <= min(tokens, width) * (1 + 1e-6)
    Q = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
    assert float(effective_rank(Q.T @ Y.T @ Y @ Q)) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_at_its_ends():
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7)
    one = (
        torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 400).double()
    )
    assert float(effective_rank(one.T @ one)) == pytest.approx(1)  # 399 eigenvalues of rounding noise add nothing
    assert float(effective_rank(torch.zeros(3, 3))) == 0


def maps(seed: int, *shape: int) -> torch.Tensor:
    """Causal attention maps."""
    scores = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (2, 2, 4, 4), (3, 1, 1)])
def test_attention_divergence_is_the_mean_kl(shape):
    p, q = maps(0, *shape), maps(1, *shape)
    rows = zip(p.double().reshape(-1, shape[-1]).tolist(), q.double().reshape(-1, shape[-1]).tolist(), strict=True)
    kls = [sum(a * math.log(a / b) for a, b in zip(u, v, strict=True) if a) for u, v in rows]
    assert float(attention_divergence(p, q)) == pytest.approx(sum(kls) / len(kls), rel=1e-4, abs=1e-7)
    assert float(attention_divergence(p, p)) == pytest.approx(0, abs=1e-6)


def test_attention_that_underflows_is_finite():
    p, q = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    expected = (0.5 * math.log(0.5) * 2 - 0.5 * math.log(torch.finfo(torch.float32).tiny)) / 2
    assert float(attention_divergence(p, q)) == pytest.approx(expected)
