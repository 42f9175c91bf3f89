"""Perplexity and distances against plain re-computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.evaluation.perplexity import (
    TokenPerplexity,
    attention_divergence,
    effective_rank,
    token_similarity,
    token_similarity_error,
)


def brute_force(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Token by token, in float64."""
    total, count = 0.0, 0
    for logits, ids in batches:
        for window, tokens in zip(logits.double(), ids, strict=True):
            for t in range(len(tokens) - 1):
                total -= float(window[t, tokens[t + 1]] - torch.logsumexp(window[t], 0))
                count += 1
    return math.exp(total / count)


def random_batch(b: int, T: int, V: int, seed: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(b, T, V, generator=g).to(dtype), torch.randint(V, (b, T), generator=g)


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(2, 9)), min_size=1, max_size=4),
    positions=st.integers(1, 10),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_perplexity_equals_brute_force_however_it_is_cut(shapes, positions, dtype):
    batches = [random_batch(b, T, 11, i, dtype) for i, (b, T) in enumerate(shapes)]
    metric = TokenPerplexity(positions=positions)
    for logits, ids in batches:
        metric.update(logits, ids)
    assert float(metric.compute()) == pytest.approx(brute_force(batches), rel=1e-5)


def test_perplexity_of_the_uniform_distribution_is_the_vocabulary_size():
    metric = TokenPerplexity()
    metric.update(torch.zeros(2, 7, 50), torch.zeros(2, 7, dtype=torch.int64))
    assert float(metric.compute()) == pytest.approx(50)


def test_ranks_are_summed_not_averaged():
    """What a sync does: states are reduced with `sum`, then computed once."""
    one, two, both = TokenPerplexity(), TokenPerplexity(), TokenPerplexity()
    first, second = random_batch(1, 3, 9, 0), random_batch(4, 8, 9, 1)
    one.update(*first)
    two.update(*second)
    both.update(*first)
    both.update(*second)
    assert [reduction.__name__ for reduction in one._reductions.values()] == ["dim_zero_sum"] * 2
    merged = torch.exp((one.nll + two.nll) / (one.tokens + two.tokens))
    assert float(merged) == pytest.approx(float(both.compute()), rel=1e-12)
    mean = (float(one.compute()) + float(two.compute())) / 2
    assert mean != pytest.approx(float(both.compute()), rel=1e-3)


def test_perplexity_is_accumulated_in_float64():
    """A float32 sum would stop growing: 2^24 + 1 = 2^24."""
    metric = TokenPerplexity()
    metric.nll += 2.0**24
    logits = torch.zeros(1, 2, 2)
    metric.update(logits, torch.zeros(1, 2, dtype=torch.int64))
    assert float(metric.nll) == pytest.approx(2.0**24 + math.log(2), rel=1e-12)
    metric.reset()
    assert float(metric.nll) == 0
    assert int(metric.tokens) == 0


@pytest.mark.parametrize(
    ("logits", "ids"), [((2, 5, 7), (2, 4)), ((2, 1, 7), (2, 1)), ((5, 7), (5,)), ((2, 5, 7), (1, 5))]
)
def test_perplexity_refuses_shapes_that_do_not_fit(logits, ids):
    with pytest.raises(ValueError, match="expected"):
        TokenPerplexity().update(torch.zeros(logits), torch.zeros(ids, dtype=torch.int64))


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
