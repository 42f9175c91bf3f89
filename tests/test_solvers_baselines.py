"""The published methods against brute force, least squares and plain versions of themselves."""

import itertools
import json

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import auto_cli
from torch import Tensor

from lit_binq import cli
from lit_binq.errors import LitBinqError
from lit_binq.formats import Levels, RowColumn, RowMean, Sparse8
from lit_binq.hub import load_packed, packed_linears
from lit_binq.solvers import (
    ARB,
    ARBRC,
    ARBX,
    CGB,
    PBLLM,
    BiLLM,
    RowColumnSolver,
    Solver,
    amp_metric,
    arb,
    objective_value,
    row_column,
)
from lit_binq.solvers import amp as amp_gate
from lit_binq.solvers.feedback import column_by_column, feedback_codes, inverse_factor
from lit_binq.solvers.zones import Part, fit_parts, large_weights, salient_columns
from lit_binq.stages import ClosedForm

ALL: list[Solver] = [
    ARB(),
    ARBRC(),
    ARBX(),
    BiLLM(block=8),
    CGB(block=8),
    CGB(block=8, scales="row"),
    PBLLM(),
    RowColumnSolver(start_from="error_feedback"),
]


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
    errors = [f(ARB(iterations=n).solve(T, eye).dense(), T, eye) for n in (0, 1, 15, 200)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    s = ARB(iterations=200).solve(T, eye)
    torch.testing.assert_close(arb.update(s, T).dense(), s.dense(), rtol=1e-4, atol=1e-5)


def test_the_start_of_arb_is_xnor() -> None:
    T, H = (t.float() for t in problem(5, 9, 0))
    s = ARB(iterations=0).solve(T, H)
    mean = T.mean(1, keepdim=True)
    expected = mean + (T - mean).abs().mean(1, keepdim=True) * (T - mean).sign()
    torch.testing.assert_close(s.dense(), expected)


def test_arb_rc_is_the_row_column_solver_before_its_rounds() -> None:
    T, H = (t.float() for t in problem(8, 12, 1))
    ours = RowColumnSolver(rounds=0, start_iterations=15).solve(T, H)
    assert torch.equal(ARBRC().solve(T, H).dense(), ours.dense())
    eye = torch.eye(12)
    errors = [f(ARBRC(iterations=n).solve(T, eye).dense(), T, eye) for n in range(12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    # for H = I there is nothing better to be found for these codes, and they are the best
    full = RowColumnSolver(rounds=3).solve(T, eye)
    assert objective_value(full, T, eye) == pytest.approx(errors[-1], rel=1e-3)
    assert torch.equal(full.B * full.r.sign()[:, None] * full.c.sign(), torch.where(T >= 0, 1.0, -1.0))


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_arb_x_ends_at_the_least_squares_mean_and_size(N: int, K: int, seed: int) -> None:
    T, H = (t.float() for t in problem(N, K, seed))
    s = ARBX(output_iterations=3000).solve(T, H)
    codes = ARB().solve(T, H).B
    assert torch.equal(s.B, codes)
    Lt = torch.linalg.cholesky(H.double()).T
    for i in range(N):
        columns = torch.stack((torch.ones(K).double(), codes[i].double()), 1)
        best = torch.linalg.lstsq(Lt @ columns, Lt @ T[i].double()[:, None], driver="gelsd").solution
        optimum = f((columns @ best).T, T[i : i + 1], H)
        assert f(s.dense()[i : i + 1], T[i : i + 1], H) <= optimum * (1 + 1e-4) + 1e-6


def test_no_round_of_arb_x_raises_f_and_it_beats_arb_under_h() -> None:
    T, H = (t.float() for t in problem(9, 20, 4))
    values = [objective_value(ARBX(output_iterations=n).solve(T, H), T, H) for n in range(10)]
    assert values[0] == pytest.approx(objective_value(ARB().solve(T, H), T, H), rel=1e-6)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(values))
    assert values[-1] < 0.99 * values[0]


def test_arb_x_under_the_identity_is_arb() -> None:
    """Once ARB has come to rest, its mean and size are the least-squares ones."""
    T = torch.randn(7, 30, generator=torch.Generator().manual_seed(2))
    eye = torch.eye(30)
    weight = ARB(iterations=300).solve(T, eye)
    torch.testing.assert_close(ARBX(iterations=300).solve(T, eye).dense(), weight.dense(), rtol=1e-4, atol=1e-5)


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


def test_error_feedback_as_a_start() -> None:
    gains = []
    for seed in range(8):
        T, H = (t.float() for t in problem(16, 24, seed))
        signs = RowColumnSolver(rounds=0).solve(T, H)
        fed = RowColumnSolver(rounds=0, start_from="error_feedback").solve(T, H)
        assert torch.equal(fed.r, signs.r)
        assert torch.equal(fed.c, signs.c)
        gains.append(objective_value(fed, T, H) / objective_value(signs, T, H))
        eye = torch.eye(24)
        assert torch.equal(feedback_codes(signs, T, eye).B, signs.B)  # no column can help another
        rounds = RowColumnSolver(start_from="error_feedback").solve(T, H)
        assert objective_value(rounds, T, H) <= objective_value(fed, T, H)
    assert max(gains) < 1
    assert sum(gains) / len(gains) < 0.8


def test_a_metric_that_cannot_be_inverted() -> None:
    H = torch.zeros(6, 6)
    H[0, 0] = 1.0
    U = inverse_factor(H, 0.01)  # damped
    assert torch.isfinite(U).all()
    assert torch.isfinite(inverse_factor(torch.ones(6, 6))).all()  # damping is raised until it works
    with pytest.raises(LitBinqError, match="cannot be inverted"):
        inverse_factor(-torch.eye(6))


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
    # one block: nothing to compensate
    with_feedback, without = (solver(block=24, feedback=on).solve(T, H).dense() for on in (True, False))
    assert torch.equal(with_feedback, without)
    # three blocks: each one's errors, column by column over U_jj, go to all later columns and none of its own
    s = solver(block=8, damping=0.05)
    W = s.solve(T, H).dense()
    U = inverse_factor(H, 0.05)
    target = T.clone()
    for begin in (0, 8, 16):
        block = target[:, begin : begin + 8]
        price = torch.tensor([1 / float(U[j, j]) ** 2 for j in range(begin, begin + 8)])
        torch.testing.assert_close(s._fit(block, price).dense(), W[:, begin : begin + 8], rtol=1e-3, atol=1e-4)
        for j in range(begin, begin + 8):
            for k in range(begin + 8, 24):
                target[:, k] -= (target[:, j] - W[:, j]) / U[j, j] * U[j, k]
    plain = solver(block=8, feedback=False).solve(T, H).dense()
    assert torch.equal(plain[:, :8], W[:, :8]) or torch.allclose(plain[:, :8], W[:, :8], atol=1e-5)
    assert not torch.allclose(plain[:, 8:], W[:, 8:], atol=1e-2)


@pytest.mark.parametrize("solver", [BiLLM(block=8), CGB(block=8), PBLLM()])
def test_with_the_identity_there_is_nothing_to_compensate(solver: BiLLM | PBLLM) -> None:
    T, _ = (t.float() for t in problem(10, 24, 6))
    eye = torch.eye(24)
    with_feedback = solver.solve(T, eye).dense()
    solver = type(solver)(**{**vars(solver), "feedback": False, "saliency": "magnitude"})
    torch.testing.assert_close(solver.solve(T, eye).dense(), with_feedback)


def test_billm_codes_and_zones() -> None:
    T, H = (t.float() for t in problem(10, 20, 7))
    s = BiLLM(block=8).solve(T, H)
    assert isinstance(s, Levels)
    assert s.levels.shape == (10, 2 * 3, 4)
    assert s.group == 8
    assert s.salient is not None
    assert all(1 <= int(s.salient[i : i + 8].sum()) < 8 for i in (0, 8))
    assert s.pack().true_bits() == pytest.approx(8 * (10 * 3 * 2 + 10 * 6 * 4 * 2 + 3) / 200)
    L = s.levels
    even = L[:, ::2]  # not salient: m1 -+ a1, m2 -+ a2
    assert (even[..., 1] >= even[..., 0]).all()
    assert (even[..., 3] >= even[..., 2]).all()
    odd = L[:, 1::2]  # salient: the two signs add up
    torch.testing.assert_close(odd[..., 0] + odd[..., 3], odd[..., 1] + odd[..., 2])


def test_alternation_pays_in_cgb() -> None:
    T, H = (t.float() for t in problem(32, 48, 8))
    errors = {
        scales: [f(CGB(block=16, scales=scales, iterations=n, feedback=False).solve(T, H).dense(), T, torch.eye(48))
                 for n in (0, 15)]
        for scales in ("row", "row_column")
    }  # fmt: skip
    plain = f(BiLLM(block=16, feedback=False).solve(T, H).dense(), T, torch.eye(48))
    assert errors["row"][0] == pytest.approx(plain, rel=1e-5)  # no rounds with means: BiLLM
    assert errors["row"][1] < errors["row"][0]
    assert errors["row_column"][1] < errors["row_column"][0]


# ---- PB-LLM --------------------------------------------------------------------------------------------------------


def test_pb_llm_by_hand() -> None:
    T = torch.tensor([[1.0, -2.0, 12.7, 3.0], [0.5, -25.4, -0.5, 6.35]])
    s = PBLLM(share=3 / 8, feedback=False).solve(T, torch.eye(4))
    assert isinstance(s, Sparse8)
    assert torch.equal(s.mask, torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool))
    torch.testing.assert_close(s.dense(), torch.tensor([[2.0, -2, 12.7, 2], [0.5, -25.4, -0.5, 6.4]]))
    assert s.Q[1].tolist() == [0, -127, 0, 32]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_pb_llm_shares(share: float) -> None:
    T, H = (t.float() for t in problem(20, 30, 9))
    s = PBLLM(share=share).solve(T, H)
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
        s = PBLLM(share=0.2).solve(T, H)
        assert float(P[s.mask].min()) >= float(P[~s.mask].max())
        plain = PBLLM(share=0.2, feedback=False).solve(T, H)
        assert torch.equal(plain.mask, s.mask)
        helped.append(objective_value(s, T, H) / objective_value(plain, T, H))
    assert sum(helped) / len(helped) < 0.8


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
    nothing = torch.zeros(12, 12)
    gated = RowColumnSolver().solve(T, H, amp=nothing)
    torch.testing.assert_close(gated.dense(), RowColumnSolver().solve(T, H).dense())


def test_the_gate_closes() -> None:
    """It changes what is found, still better than the start, and never aligned less than it."""
    closed = 0
    for seed in range(10):
        T, H, M = (t.float() for t in amp_problem(8, 12, seed))
        begin = aligned(RowColumnSolver(rounds=0).solve(T, H), M)
        free, gated = RowColumnSolver().solve(T, H), RowColumnSolver().solve(T, H, amp=M)
        assert aligned(gated, M) >= begin * (1 - 1e-6)
        assert objective_value(gated, T, H) <= objective_value(RowColumnSolver(rounds=0).solve(T, H), T, H)
        closed += not torch.equal(free.dense(), gated.dense())
    assert closed > 5


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 17)])
def test_every_method_packs_what_it_found(solver: Solver, shape: tuple[int, int]) -> None:
    T, H = (t.float() for t in problem(*shape, 0))
    kept = T.clone(), H.clone()
    s = solver.solve(T, H)
    assert torch.equal(T, kept[0])
    assert torch.equal(H, kept[1])
    assert torch.isfinite(s.dense()).all()
    assert f(s.dense(), T, torch.eye(shape[1])) < 30 * f(torch.zeros_like(T), T, torch.eye(shape[1]))
    layer = s.pack(torch.ones(shape[0]))
    torch.testing.assert_close(layer.dequantize(), s.dense(), rtol=4e-3, atol=4e-3)
    stored = sum(t.numel() * t.element_size() for n, t in layer.state_dict().items() if n != "bias")
    assert layer.true_bits() == 8 * stored / (shape[0] * shape[1])
    latent = layer.latent(True, T)
    assert torch.equal(latent.pack().dequantize(), layer.dequantize())


@pytest.mark.parametrize("solver", ALL, ids=lambda s: type(s).__name__)
def test_extremes(solver: Solver) -> None:
    _, H = (t.float() for t in problem(1, 16, 0))
    assert float(solver.solve(torch.zeros(4, 16), H).dense().abs().max()) == 0
    T = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    T[1] = 0
    T[:, 3] = 0
    for metric in (H, torch.eye(16), torch.ones(16, 16) + 1e-6 * torch.eye(16)):
        assert torch.isfinite(solver.solve(T, metric).dense()).all()
    bad = T.clone()
    bad[0, 0] = float("nan")
    for pair in ((bad, H), (T, H * float("inf"))):
        with pytest.raises(LitBinqError, match="target or metric holds NaN or inf"):
            solver.solve(*pair)
    scaled = solver.solve(T * 2.0**-6, H * 4.0).dense()
    torch.testing.assert_close(scaled * 2.0**6, solver.solve(T, H).dense(), rtol=1e-4, atol=1e-4)


def parsed(*arguments: str) -> ClosedForm:
    """What the command line makes of options of `closed_form`."""

    def given(closed_form: ClosedForm) -> ClosedForm:
        return closed_form

    return auto_cli(given, args=[*arguments], as_positional=False)


@pytest.mark.parametrize("name", ["ARB", "ARBRC", "ARBX", "BiLLM", "CGB", "PBLLM", "RowColumnSolver"])
def test_each_method_is_one_line_of_yaml(name: str) -> None:
    assert type(parsed(f"--closed_form.solver={name}").solver).__name__ == name


def test_options_on_the_command_line() -> None:
    text = '{"objective": "pseudo_target", "shrinkage": 0, "solver": {"class_path": "CGB", "init_args": %s}}'
    form = parsed("--closed_form", text % '{"scales": "row", "iterations": 3, "block": 64}')
    assert form.solver == CGB(scales="row", iterations=3, block=64)
    form = parsed("--closed_form.solver=RowColumnSolver", "--closed_form.solver.start_from=error_feedback")
    assert form.solver == RowColumnSolver(start_from="error_feedback")


@pytest.mark.parametrize(("name", "kind"), [("CGB", "levels"), ("ARBX", "row_mean"), ("PBLLM", "sparse8")])
def test_a_fit_with_tuning_of_codes(name: str, kind: str, tokenizer, text_file, tmp_path) -> None:
    tiny_model("llama", blocks=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = {"path": str(text_file)}
    model = {"model": str(tmp_path / "model"), "packed": str(tmp_path / "packed"), "tuning": {"epochs": 2}}
    config = {
        "model": model | {"closed_form": {"solver": name, "objective": "pseudo_target"}},
        "data": {"train": text, "window_length": 32, "windows": 8, "evaluation": {"text": text}}
        | {"eval_windows": 2, "eval_length": 32},
        "checkpoint": {"dirpath": str(tmp_path / "checkpoint")},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["fit", "--config", str(tmp_path / "config.json")]) == 0
    packed = packed_linears(load_packed(tmp_path / "packed")[0])
    assert {layer.kind for layer in packed.values()} == {kind}
    assert len(packed) == 7


@pytest.mark.parametrize(
    ("solver", "options", "words"),
    [
        (ARB, {"iterations": -1}, r"solver\.iterations: got -1"),
        (ARBRC, {"iterations": -1}, r"solver\.iterations: got -1"),
        (ARBX, {"output_iterations": -1}, r"solver\.iterations: got -1"),
        (BiLLM, {"block": 0}, r"solver\.block: got 0"),
        (BiLLM, {"damping": -0.1}, r"solver\.damping: got -0.1"),
        (BiLLM, {"saliency": "x"}, r"solver\.saliency: got 'x'"),
        (CGB, {"scales": "x"}, r"solver\.scales: got 'x'"),
        (CGB, {"iterations": -2}, r"solver\.iterations: got -2"),
        (CGB, {"block": -1}, r"solver\.block: got -1"),
        (PBLLM, {"share": 1.5}, r"solver\.share: got 1.5"),
        (PBLLM, {"saliency": "x"}, r"solver\.saliency: got 'x'"),
        (PBLLM, {"damping": float("nan")}, r"solver\.damping: got nan"),
        (RowColumnSolver, {"start_from": "x"}, r"solver\.start_from: got 'x'"),
    ],
)
def test_options_that_make_no_sense_are_refused(solver: type[Solver], options: dict, words: str) -> None:
    with pytest.raises(LitBinqError, match=words) as caught:
        solver(**options)
    assert "\n" not in str(caught.value)
