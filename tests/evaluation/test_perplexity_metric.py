"""Perplexity against plain re-computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_binq.evaluation.perplexity import TokenPerplexity


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
