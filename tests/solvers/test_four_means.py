"""Weighted 4-means by EM: against the exact optimum, steps that never raise the error, tied levels, extremes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.solvers.four_means import (
    Line,
    by_rank,
    canonical,
    e_step,
    error,
    four_means,
    m_step,
    nearest_ranks,
    search_cuts,
    starts,
)

VALUES = ("gaussian", "laplace", "student", "uniform")
WEIGHTS = ("one", "chi-square", "heavy")


def draw(values: str, weights: str, R: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random points and weights (R, n), float64."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(R, n, generator=g, dtype=torch.float64)
    w = {
        "gaussian": normal,
        "laplace": torch.rand(R, n, generator=g, dtype=torch.float64).log() * normal.sign(),
        # Student-t with 2 degrees of freedom
        "student": normal / (-torch.rand(R, n, generator=g, dtype=torch.float64).log()).sqrt(),
        "uniform": torch.rand(R, n, generator=g, dtype=torch.float64) * 3 + 5,
    }[values]
    other = torch.randn(R, n, generator=g, dtype=torch.float64)
    return w, {"one": torch.ones_like(w), "chi-square": other.square(), "heavy": (3 * other).exp()}[weights]


def optimum(w: Tensor, h: Tensor, k: int = 4) -> Tensor:
    """The least error (R,) by dynamic programming: clusters are intervals of the sorted points."""
    n = w.shape[1]
    w, order = w.sort(dim=1)
    h = h.gather(1, order)
    moments = [torch.nn.functional.pad(t.cumsum(1), (1, 0)) for t in (h, h * w, h * w * w)]
    weight, first, second = (m[:, None, :] - m[:, :, None] for m in moments)  # of the points from i to before j
    cost = (second - torch.where(weight > 0, first.square() / weight.clamp_min(1e-300), 0.0)).clamp_min(0)
    cost.masked_fill_(torch.ones(n + 1, n + 1, dtype=torch.bool).tril(-1), torch.inf)
    best = cost[:, 0]
    for _ in range(k - 1):
        best = (best[:, :, None] + cost).amin(1)
    return best[:, -1]


def reached(p: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """e (R,) of numbers (R, L), every point with its nearest level."""
    return (h * (w[:, :, None] - by_rank(p)[:, None]).square().amin(-1)).sum(1)


def test_the_optimum_is_that_of_brute_force() -> None:
    """So that the other tests measure against what they say: all ways to cut seven points into four."""
    w, h = draw("gaussian", "chi-square", 5, 7)
    for i in range(5):
        order = w[i].argsort()
        x, y = w[i][order], h[i][order]
        best = torch.inf
        for cuts in itertools.combinations_with_replacement(range(8), 3):
            ends, total = [0, *cuts, 7], 0.0
            for a, b in itertools.pairwise(ends):
                if a < b:
                    mean = (x[a:b] * y[a:b]).sum() / y[a:b].sum()
                    total += float((y[a:b] * (x[a:b] - mean) ** 2).sum())
            best = min(best, total)
        assert float(optimum(w[i : i + 1], h[i : i + 1])) == pytest.approx(best, rel=1e-9)


@pytest.mark.grid(8)
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("values", VALUES)
def test_random_groups_reach_the_optimum(values: str, weights: str, n: int) -> None:
    """In at least 95 of 100 cases exactly, and never more than 1 % above it."""
    w, h = draw(values, weights, 300, n, seed=n)
    best = optimum(w, h)
    p, ranks = four_means(w, h)
    e = reached(p, w, h)
    assert (e >= best * (1 - 1e-7)).all()
    assert (e <= best * (1 + 1e-7)).double().mean() >= 0.95
    assert (e <= best * 1.01).all()
    chosen = p.gather(1, ranks.long())
    torch.testing.assert_close((h * (w - chosen).square()).sum(1), e)


@settings(deadline=None, max_examples=60)
@given(
    values=st.sampled_from(VALUES),
    weights=st.sampled_from(WEIGHTS),
    n=st.integers(1, 40),
    levels=st.sampled_from((2, 3, 4)),
    coarse=st.booleans(),
    seed=st.integers(0, 999),
)
def test_no_step_raises_the_error(values: str, weights: str, n: int, levels: int, coarse: bool, seed: int) -> None:
    """Each E-step for the levels as they are, each M-step for the clusters as they are; ties and zero weights too."""
    w, h = draw(values, weights, 6, n, seed)
    if coarse:
        w, h = (2 * w).round(), h * (torch.arange(n) % 3 > 0)
    g = torch.Generator().manual_seed(seed)
    line = Line.of(w, h)
    p = torch.cat((starts(line, levels), canonical(torch.randn(6, 3, levels, generator=g, dtype=torch.float64))), 1)
    reach = torch.maximum(w.abs().amax(), by_rank(p).abs().amax())
    size = h.sum(1, keepdim=True) * reach.square() + 1e-300

    def now(p: Tensor) -> Tensor:
        return torch.stack([reached(q, w, h) for q in p.unbind(1)], 1)

    e = now(p)
    for _ in range(12):
        cuts = e_step(line, p)
        torch.testing.assert_close(error(line, cuts, p) / size, e / size, rtol=0, atol=1e-12)
        p = m_step(line, cuts, p)
        after = now(p)
        assert (after <= e + 1e-12 * size).all()
        e = after


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_an_m_step_is_least_squares(levels: int) -> None:
    """For random clusters, against a solver of dense least-squares systems."""
    w, h = draw("gaussian", "chi-square", 4, 30)
    line = Line.of(w, h)
    cuts = torch.tensor([[[5, 11, 25]]]).expand(4, 1, 3)
    p = m_step(line, cuts, torch.zeros(4, 1, levels, dtype=torch.float64))[:, 0]
    rank = torch.bucketize(torch.arange(30), torch.tensor([5, 11, 25]), right=True)
    design = by_rank(torch.eye(levels, dtype=torch.float64))[:, rank].T
    for i in range(4):
        order = w[i].argsort()
        root = h[i][order].sqrt()
        wanted = torch.linalg.lstsq(root[:, None] * design, (root * w[i][order])[:, None]).solution[:, 0]
        torch.testing.assert_close(p[i], canonical(wanted), rtol=1e-5, atol=1e-7)


def test_what_points_do_not_determine_stays() -> None:
    """A level without points; and of a1 and a2, where all points are at the two upper levels, the part that matters."""
    line = Line.of(torch.tensor([[1.0, 2.0, 5.0]]).double(), torch.ones(1, 3).double())
    p = torch.tensor([[[1.4, 3.0, 3.1, 5.5]]]).double()
    cuts = torch.tensor([[[2, 2, 2]]])
    torch.testing.assert_close(m_step(line, cuts, p), torch.tensor([[[1.5, 3.0, 3.1, 5.0]]]).double())
    p = torch.tensor([[[0.5, 2.5, 1.0]]]).double()  # levels -3, -1, 2, 4
    p = m_step(line, torch.tensor([[[0, 0, 2]]]), p)
    torch.testing.assert_close(by_rank(p)[0, 0, 2:], torch.tensor([1.5, 5.0]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(p[0, 0, 0] - 0.5, p[0, 0, 1] - 2.5, rtol=1e-5, atol=0)


def test_values_far_from_zero_lose_no_precision() -> None:
    w, h = draw("gaussian", "chi-square", 20, 64)
    near, far = (four_means(v, h, levels=4)[1] for v in (w, w + 2.0**28))
    assert torch.equal(near, far)
    p = four_means(w + 2.0**28, h, levels=3)[0]
    torch.testing.assert_close(
        reached(p, w + 2.0**28, h), reached(four_means(w, h, levels=3)[0], w, h), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("levels", [2, 3])
def test_tied_levels_come_near_the_best_of_many_starts(levels: int) -> None:
    w, h = draw("laplace", "chi-square", 40, 64)
    e = reached(four_means(w, h, levels)[0], w, h)
    line = Line.of(w, h)
    g = torch.Generator().manual_seed(0)
    p = canonical(torch.randn(40, 300, levels, generator=g, dtype=torch.float64))
    for _ in range(60):
        p = m_step(line, e_step(line, p), p)
    best = error(line, e_step(line, p), p).amin(1)
    assert (e <= best * 1.2).all()
    assert float((e / best).mean()) < 1.01
    free = reached(four_means(w, h, 4)[0], w, h)
    assert (free <= e).all()


def test_a_search_finds_the_best_cuts_among_its_places() -> None:
    w, h = draw("student", "heavy", 8, 9)
    line = Line.of(w, h)
    places = torch.tensor([[0, 2, 3, 5, 8]]).expand(8, -1)
    found = m_step(line, search_cuts(line, places)[:, None], torch.zeros(8, 1, 4, dtype=torch.float64))
    e = error(line, search_cuts(line, places)[:, None], found)[:, 0]
    ways = torch.tensor(list(itertools.combinations_with_replacement((0, 2, 3, 5, 8), 3))).expand(8, -1, -1)
    every = error(line, ways, m_step(line, ways, torch.zeros(8, ways.shape[1], 4, dtype=torch.float64)))
    # An empty cluster's level may be sorted elsewhere, which names the clusters wrongly: only the least counts.
    torch.testing.assert_close(e, torch.minimum(e, every.amin(1)))
    everywhere = torch.arange(10).expand(8, -1)
    p = m_step(line, search_cuts(line, everywhere)[:, None], torch.zeros(8, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(reached(p[:, 0], w, h), optimum(w, h))


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(levels: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(16, generator=g)
    rows = {
        "zeros": torch.zeros(16),
        "constant": torch.full((16,), 3.7),
        "three values": torch.tensor([1.0, 2.0, 4.0, 4.0] * 4),
        "huge": normal * 1e37,
        "tiny": normal * 1e-37,
        "far from zero": 1e4 + normal,
        "one far out": torch.cat((normal[:15] * 1e-6, torch.tensor([1e6]))),
    }
    w = torch.stack(list(rows.values())).to(dtype)
    for h in (torch.ones(16), torch.zeros(16), torch.logspace(-38, 38, 16), torch.tensor([0.0, 1.0] * 8)):
        p, ranks = four_means(w, h.to(dtype), levels)
        assert p.shape == (len(rows), levels)
        assert p.dtype == dtype
        assert torch.isfinite(p).all()
        assert torch.equal(p, canonical(p))
        assert torch.equal(ranks, nearest_ranks(w, by_rank(p)))
    p, ranks = four_means(w, torch.ones(16), levels)
    value = by_rank(p).gather(1, ranks.long())
    assert torch.equal(value[0], w[0])
    if levels > 2:
        torch.testing.assert_close(value[1:2], w[1:2])
        assert ((value[5] - w[5]).abs() < 1.2).all()
    if levels == 4:
        torch.testing.assert_close(value[2], w[2])
        assert float(value[6, -1]) == pytest.approx(1e6)
    # A group of its own weights is the same as if all its points counted alike.
    for a, b in zip(four_means(w, torch.zeros(16), levels), (p, ranks), strict=True):
        assert torch.equal(a, b)


def test_points_without_weight_do_not_count_but_get_a_level() -> None:
    w = torch.tensor([[0.0, 1.0, 2.0, 3.0, 100.0, -50.0, 1.4]])
    h = torch.tensor([1.0, 1, 1, 1, 0, 0, 0])
    p, ranks = four_means(w, h)
    torch.testing.assert_close(p, torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    assert ranks.tolist() == [[0, 1, 2, 3, 3, 0, 1]]


def test_few_points() -> None:
    for n in (1, 2, 3, 4):
        w = torch.arange(1.0, n + 1)[None]
        p, ranks = four_means(w, torch.ones(n))
        torch.testing.assert_close(p.gather(1, ranks.long()), w)


def test_groups_do_not_depend_on_each_other() -> None:
    w, h = draw("gaussian", "chi-square", 2500, 16)  # more than are worked on at once
    p, ranks = four_means(w, h)
    for i in (0, 1023, 1024, 2499):
        one, rank = four_means(w[i : i + 1], h[i : i + 1])
        torch.testing.assert_close(one[0], p[i])
        assert torch.equal(rank[0], ranks[i])
