"""BiLLM, CGB and PB-LLM, and the zones they share, against brute force and plain loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.solvers import (
    CGB,
    PBLLM,
    BiLLM,
    Problem,
    objective_value,
)
from lit_binq.solvers.baselines.billm import zones
from lit_binq.solvers.baselines.pb_llm import Sparse8
from lit_binq.solvers.baselines.zones import Levels, Part, fit_parts, large_weights, salient_columns
from lit_binq.statistics.error_feedback import inverse_factor
from problems import f, problem

# ---- zones ---------------------------------------------------------------------------------------------------------


def plain_binarize(P: Tensor, mask: Tensor, orders: int) -> Tensor:
    """Row by row with boolean indexing: mean and mean distance of the masked weights, `orders` times."""
    out = torch.zeros_like(P)
    for i in range(len(P)):
        rest = P[i][mask[i]]
        for _ in range(orders):
            if len(rest):
                mean = rest.mean()
                size = (rest - mean).abs().mean()
                value = mean + size * torch.where(rest >= mean, 1.0, -1.0)
                out[i][mask[i]] += value
                rest = rest - value
    return out


@settings(deadline=None, max_examples=25)
@given(N=st.integers(1, 5), b=st.integers(2, 12), seed=st.integers(0, 10_000))
def test_zones_are_the_best_of_a_plain_search(N: int, b: int, seed: int) -> None:
    P = torch.randn(N, b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    order = P.sum(0).argsort(descending=True)
    errors = []
    for i in range(1, b):
        mask = torch.zeros(N, b, dtype=torch.bool)
        mask[:, order[:i]] = True
        errors.append(float((P - plain_binarize(P, mask, 2) - plain_binarize(P, ~mask, 2)).square().sum()))
    salient = salient_columns(P)
    found = errors[int(salient.sum()) - 1]
    assert found <= min(errors) * (1 + 1e-6) + 1e-12 * float(P.square().sum())
    assert set(salient.nonzero()[:, 0].tolist()) == set(order[: int(salient.sum())].tolist())
    assert int(salient_columns(P, 1).sum()) == 1

    rest = ~salient.expand(N, b)
    flat = (P * rest).flatten()
    errors = []
    for split in torch.quantile(flat, torch.linspace(0.1, 0.9, 81, dtype=torch.float64)):
        above = torch.ge(P, split)
        parts = (rest & ~above, rest & above)
        errors.append(float(((P - sum(plain_binarize(P, m, 1) for m in parts)) * rest).square().sum()))
    large = large_weights(P, salient)
    assert not (large & ~rest).any()
    found = plain_binarize(P, rest & ~large, 1) + plain_binarize(P, rest & large, 1)
    error = float(((P - found) * rest).square().sum())
    assert error <= min(errors) * (1 + 1e-6) + 1e-12 * float(P.square().sum())


@settings(deadline=None, max_examples=25)
@given(N=st.integers(1, 5), b=st.integers(2, 12), seed=st.integers(0, 10_000))
def test_the_first_binarization_is_row_mean_and_mean_distance(N: int, b: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, b, generator=g, dtype=torch.float64)
    salient = torch.rand(b, generator=g) < 0.4
    large = (torch.rand(N, b, generator=g) < 0.5) & ~salient
    s = fit_parts(w, salient, large, iterations=0, means=True, column_scales=False)
    plain = plain_binarize(w, salient.expand(N, b), 2)
    plain = plain + plain_binarize(w, large, 1) + plain_binarize(w, ~large & ~salient, 1)
    torch.testing.assert_close(s.dense(), plain)
    assert s.c is None


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 5), b=st.integers(1, 10), seed=st.integers(0, 10_000), orders=st.integers(1, 2))
def test_each_round_of_a_part_is_exact(N: int, b: int, seed: int, orders: int) -> None:
    """Means and sizes against least squares for one of them at a time, codes against every combination of signs."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, b, generator=g, dtype=torch.float64)
    mask = torch.rand(N, b, generator=g) < 0.7
    c = torch.randn(b, generator=g, dtype=torch.float64)
    part = Part.start(w, mask, orders, means=True)

    def error(p: Part) -> float:
        return float(((w - c * p.value()) * p.mask).square().sum())

    for _ in range(3):
        before, signs = error(part), part.B
        part.refine(w, c, means=True)
        assert error(part) <= before * (1 + 1e-9) + 1e-12
        # nothing to gain by another code for the sizes as they are
        values = [
            part.m[:, None] + sum(s * a[:, None] for s, a in zip(way, part.a, strict=True))
            for way in itertools.product((-1.0, 1.0), repeat=orders)
        ]
        best = torch.stack([(w - c * v).abs() for v in values]).amin(0)
        torch.testing.assert_close((w - c * part.value()).abs() * part.mask, best * part.mask)
        # the last size, of the signs before, is the least-squares one
        kept = Part(part.mask, part.m, list(part.a), signs)
        for step in (1e-3, -1e-3):
            moved = Part(part.mask, part.m, [*part.a[:-1], part.a[-1] + step], signs)
            assert error(moved) >= error(kept) - 1e-12


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 6), b=st.integers(1, 14), seed=st.integers(0, 10_000), rc=st.booleans())
def test_alternation_in_zones_never_raises_the_error(N: int, b: int, seed: int, rc: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, b, generator=g, dtype=torch.float64)
    salient = torch.rand(b, generator=g) < 0.4
    large = (w.abs() > 0.8) & ~salient
    errors = []
    for n in range(6):
        s = fit_parts(w, salient, large, iterations=n, means=not rc, column_scales=rc)
        errors.append(float((w - s.dense()).square().sum()))
        assert (s.c is not None) == rc
        if rc:  # no means: levels of each pair are opposite
            torch.testing.assert_close(s.levels.sum(-1), torch.zeros(N, 2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(errors))


# ---- BiLLM and CGB -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [BiLLM, CGB])
def test_errors_are_compensated_between_blocks_only(solver: type[BiLLM]) -> None:
    T, H = (t.float() for t in problem(12, 24, 5))
    # three blocks: each one's errors, column by column over U_jj, go to all later columns and none of its own
    s = solver(block=8)
    W = s.solve(Problem(T, H)).dense()
    U = inverse_factor(H, 0.01)
    target = T.clone()
    for begin in (0, 8, 16):
        block = target[:, begin : begin + 8]
        price = torch.tensor([1 / float(U[j, j]) ** 2 for j in range(begin, begin + 8)])
        torch.testing.assert_close(s._fit(block, price).dense(), W[:, begin : begin + 8], rtol=1e-3, atol=1e-4)
        for j in range(begin, begin + 8):
            for k in range(begin + 8, 24):
                target[:, k] -= (target[:, j] - W[:, j]) / U[j, j] * U[j, k]


@pytest.mark.parametrize("solver", [BiLLM, CGB])
def test_with_the_identity_there_is_nothing_to_compensate(solver: type[BiLLM]) -> None:
    """Every block is fitted as if it were alone."""
    T, _ = (t.float() for t in problem(10, 24, 6))
    whole = solver(block=8).solve(Problem(T, torch.eye(24))).dense()
    blocks = [solver(block=8).solve(Problem(w, torch.eye(8))).dense() for w in T.split(8, 1)]
    torch.testing.assert_close(whole, torch.cat(blocks, 1))


def test_billm_codes_and_zones() -> None:
    T, H = (t.float() for t in problem(10, 20, 7))
    s = BiLLM(block=8).solve(Problem(T, H))
    assert isinstance(s, Levels)
    assert s.levels.shape == (10, 2 * 3, 4)
    assert s.group == 8
    assert all(1 <= int(s.salient[i : i + 8].sum()) < 8 for i in (0, 8))
    assert s.pack().true_bits() == pytest.approx(8 * (10 * 3 * 2 + 10 * 6 * 4 * 2 + 3) / 200)
    L = s.levels
    even = L[:, ::2]  # not salient: m1 -+ a1, m2 -+ a2
    assert (even[..., 1] >= even[..., 0]).all()
    assert (even[..., 3] >= even[..., 2]).all()
    odd = L[:, 1::2]  # salient: the two signs add up
    torch.testing.assert_close(odd[..., 0] + odd[..., 3], odd[..., 1] + odd[..., 2])


def test_alternation_pays_in_cgb() -> None:
    """Against one round of its sizes and signs, without compensation between blocks."""
    w = problem(32, 16, 8)[0].float()
    salient, large = zones(w.square())
    one, many = (
        f(fit_parts(w, salient, large, iterations=n, means=False, column_scales=True).dense(), w, torch.eye(16))
        for n in (0, 15)
    )
    assert many < one
    assert f(CGB(block=16).solve(Problem(w, torch.eye(16))).dense(), w, torch.eye(16)) == pytest.approx(many, rel=1e-5)


# ---- PB-LLM --------------------------------------------------------------------------------------------------------


def test_pb_llm_by_hand() -> None:
    T = torch.tensor([[1.0, -2.0, 12.7, 3.0], [0.5, -25.4, -0.5, 6.35]])
    s = PBLLM(share=3 / 8).solve(Problem(T, torch.eye(4)))
    assert isinstance(s, Sparse8)
    assert torch.equal(s.mask, torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool))
    torch.testing.assert_close(s.dense(), torch.tensor([[2.0, -2, 12.7, 2], [0.5, -25.4, -0.5, 6.4]]))
    assert s.Q[1].tolist() == [0, -127, 0, 32]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_pb_llm_shares(share: float) -> None:
    T, H = (t.float() for t in problem(20, 30, 9))
    s = PBLLM(share=share).solve(Problem(T, H))
    assert int(s.mask.sum()) == round(share * 600)
    packed = s.pack()
    assert packed.true_bits() == (20 * 4 * 2 + round(share * 600) + 20 * 4) * 8 / 600
    assert torch.equal(packed.dequantize().sign(), s.dense().sign()) or share > 0
    if share == 0:
        assert torch.equal(s.r, T.abs().mean(1))
    if share == 1:
        assert objective_value(s, T, H) < 1e-3 * f(torch.zeros_like(T), T, H)
    assert float(s.Q.abs().max()) <= 127


def test_pb_llm_takes_what_is_salient_and_feedback_helps() -> None:
    helped = []
    for seed in range(6):
        T, H = (t.float() for t in problem(16, 24, seed))
        P = T.square() / inverse_factor(H, 0.01).diagonal().square()
        s = PBLLM(share=0.2).solve(Problem(T, H))
        assert float(P[s.mask].min()) >= float(P[~s.mask].max())
        plain = torch.where(s.mask, s.s[:, None] * (T / s.s[:, None]).round(), s.r[:, None] * T.sign())
        helped.append(objective_value(s, T, H) / f(plain, T, H))
    assert sum(helped) / len(helped) < 0.8
