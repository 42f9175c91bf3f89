"""The row x column solver against brute force, exact least squares and a plain unblocked version of itself."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_binq.errors import LitBinqError
from lit_binq.formats import RowColumn
from lit_binq.solvers import Problem, objective_value
from lit_binq.solvers.row_column import (
    RowColumnSolver,
    start,
    update_codes,
    update_column_scales,
    update_row_scales,
)
from problems import problem


def random_start(N: int, K: int, seed: int) -> RowColumn:
    """Scales of either sign and random codes, float64."""
    g = torch.Generator().manual_seed(seed + 10_000)
    r, c = (torch.randn(n, generator=g, dtype=torch.float64) for n in (N, K))
    return RowColumn(r, c, torch.randint(2, (N, K), generator=g).double() * 2 - 1)


def f(s: RowColumn, T: Tensor, H: Tensor) -> float:
    """tr((T - W^) H (T - W^)^T), written out in float64 from the parts."""
    R = T.double() - torch.diag(s.r.double()) @ s.B.double() @ torch.diag(s.c.double())
    return float(torch.einsum("ij,jk,ik->", R, H.double(), R))


def flipped(s: RowColumn, i: int, j: int) -> RowColumn:
    B = s.B.clone()
    B[i, j] = -B[i, j]
    return RowColumn(s.r, s.c, B)


def plain_codes(s: RowColumn, T: Tensor, H: Tensor, sweeps: int = 1) -> RowColumn:
    """Cyclic coordinate descent by evaluating f itself for both values of each code."""
    for _ in range(sweeps):
        for j in range(s.B.shape[1]):
            for i in range(s.B.shape[0]):
                other = flipped(s, i, j)
                # Only row i changes.
                here = [f(RowColumn(o.r[i : i + 1], o.c, o.B[i : i + 1]), T[i : i + 1], H) for o in (s, other)]
                s = other if here[1] < here[0] else s
    return s


def plain_rows(s: RowColumn, T: Tensor, H: Tensor) -> RowColumn:
    """The best r row by row: least squares of L^T t_i on L^T q_i with H = L L^T."""
    Lt = torch.linalg.cholesky(H).T
    pairs = zip(T, s.B, strict=True)
    r = [torch.linalg.lstsq((Lt @ (b * s.c))[:, None], (Lt @ t)[:, None]).solution[0, 0] for t, b in pairs]
    return RowColumn(torch.stack(r), s.c, s.B)


def plain_columns(s: RowColumn, T: Tensor, H: Tensor) -> RowColumn:
    """The best c: one least-squares problem over all rows, L^T diag(r_i B_i) c ~ L^T t_i."""
    Lt = torch.linalg.cholesky(H).T
    A = torch.cat([Lt * (r * b) for r, b in zip(s.r, s.B, strict=True)])
    y = torch.cat([Lt @ t for t in T])
    return RowColumn(s.r, torch.linalg.lstsq(A, y[:, None]).solution[:, 0], s.B)


# ---- codes ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 4), K=st.integers(1, 9), seed=st.integers(0, 10_000), sweeps=st.integers(1, 2))
def test_a_sweep_decides_every_code_as_brute_force_does(N: int, K: int, seed: int, sweeps: int) -> None:
    (T, H), s = problem(N, K, seed), random_start(N, K, seed)
    swept = update_codes(s, T @ H, H, sweeps=sweeps)
    assert torch.equal(swept.B, plain_codes(s, T, H, sweeps).B)
    assert torch.equal(swept.r, s.r)
    assert torch.equal(swept.c, s.c)


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 5), K=st.integers(1, 10), seed=st.integers(0, 10_000))
def test_after_enough_sweeps_no_single_flip_helps(N: int, K: int, seed: int) -> None:
    (T, H), s = problem(N, K, seed), random_start(N, K, seed)
    s = update_codes(s, T @ H, H, sweeps=50)
    best = f(s, T, H)
    for i, j in itertools.product(range(N), range(K)):
        assert f(flipped(s, i, j), T, H) >= best * (1 - 1e-12)


def test_on_four_columns_most_rows_reach_the_global_optimum() -> None:
    """Coordinate descent from sign(T): never below the best of all 2^K codes, and there on most rows.

    When this was written, on 275 of the 300.
    """
    N, K, reached, gap = 50, 4, 0, []
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=K)), dtype=torch.float64)
    for seed in range(6):
        T, H = problem(N, K, seed)
        s = start(T, 10)
        s = update_codes(RowColumn(s.r, s.c, s.B.double()), T @ H, H, sweeps=20)
        for i in range(N):
            R = T[i] - s.r[i] * every * s.c
            best = float(((R @ H) * R).sum(1).min())
            found = f(RowColumn(s.r[i : i + 1], s.c, s.B[i : i + 1]), T[i : i + 1], H)
            assert found >= best * (1 - 1e-12)
            reached += found <= best * (1 + 1e-9)
            gap.append(found / best)
    assert reached >= 0.88 * 6 * N
    assert sum(gap) / len(gap) < 1.1


@pytest.mark.grid(3)
@pytest.mark.parametrize("widths", [(1, 1), (1, 7), (3, 8), (16, 128), (40, 40), (64, 16)])
def test_panel_widths_do_not_matter(widths: tuple[int, int]) -> None:
    N, K = 6, 40
    for seed in range(5):
        (T, H), s = problem(N, K, seed), random_start(N, K, seed)
        swept = update_codes(s, T @ H, H, sweeps=2, inner=widths[0], outer=widths[1])
        assert torch.equal(swept.B, plain_codes(s, T, H, 2).B)


def test_more_columns_than_an_outer_panel() -> None:
    """The widths in use, on a K that is no multiple of either, against one column at a time."""
    N, K = 3, 150
    (T, H), s = problem(N, K, 0), random_start(N, K, 0)
    swept = update_codes(s, T @ H, H, sweeps=2)
    assert torch.equal(swept.B, update_codes(s, T @ H, H, sweeps=2, inner=1, outer=1).B)
    assert float((swept.B != s.B).double().mean()) > 0.1
    s = update_codes(swept, T @ H, H, sweeps=30)
    best = f(s, T, H)
    for i, j in itertools.product(range(N), range(K)):
        assert f(flipped(s, i, j), T, H) >= best * (1 - 1e-12)


def test_ties_keep_the_code() -> None:
    s = random_start(3, 5, 0)
    s.r[1], s.c[2] = 0, 0
    T, H = problem(3, 5, 0)
    B = update_codes(s, T @ H, H).B
    assert torch.equal(B[1], s.B[1])
    assert torch.equal(B[:, 2], s.B[:, 2])
    # The two signs of b_00 are equally good: t = 0 and a diagonal H.
    s = RowColumn(torch.ones(1), torch.ones(2), torch.tensor([[-1.0, 1.0]]))
    assert torch.equal(update_codes(s, torch.zeros(1, 2), torch.eye(2)).B, s.B)


def test_the_update_as_the_paper_prints_it_is_worse() -> None:
    """arXiv 2512.21651 v1 prints the opposite sign and twice the residual: it picks the worse code nearly always."""
    ours, printed, total = 0, 0, 0
    for seed in range(20):
        (T, H), s = problem(4, 6, seed), random_start(4, 6, seed)
        G = (T - s.dense()) @ H
        for i, j in itertools.product(range(4), range(6)):
            weight, step = s.dense()[i, j], G[i, j] / H[j, j]
            values = {float(b): f(o, T, H) for o in (s, flipped(s, i, j)) for b in [o.B[i, j]]}
            best = min(values, key=values.__getitem__)
            ours += float(torch.sign(s.r[i] * s.c[j] * (weight + step))) == best
            printed += float(-torch.sign(s.r[i] * s.c[j] * (weight + 2 * step))) == best
            total += 1
    assert ours == total
    assert printed < 0.1 * total


# ---- scales --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 6), K=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_scale_updates_are_the_least_squares_solutions(N: int, K: int, seed: int) -> None:
    (T, H), s = problem(N, K, seed), random_start(N, K, seed)
    TH = T @ H
    rows = update_row_scales(s, TH, H)
    torch.testing.assert_close(rows.r, plain_rows(s, T, H).r, rtol=1e-8, atol=1e-10)
    columns = update_column_scales(s, TH, H)
    exact = plain_columns(s, T, H)
    assert f(columns, T, H) <= f(exact, T, H) * (1 + 1e-8) + 1e-12  # the ridge moves weak directions of c, not f
    if float(s.r.abs().min()) > 0.1:
        torch.testing.assert_close(columns.c, exact.c, rtol=1e-5, atol=1e-5)
    for new, name in ((rows, "r"), (columns, "c")):
        scales = {n: getattr(new, n).clone().requires_grad_(n == name) for n in ("r", "c")}
        R = T - scales["r"][:, None] * s.B * scales["c"]
        (gradient,) = torch.autograd.grad(((R @ H) * R).sum(), scales[name])
        at_zero = 2 * ((s.B * (s.c if name == "r" else s.r[:, None])) * TH).sum(1 if name == "r" else 0)
        assert float(gradient.norm()) <= 1e-6 * max(float(at_zero.norm()), 1.0)
        assert torch.equal(new.B, s.B)


def test_the_start_is_the_rank_one_fit() -> None:
    """Against the leading singular pair of |T|, which is the best rank-one fit of a positive matrix."""
    T, _ = problem(7, 9, 1)
    s = start(T, 60)
    U, S, Vh = torch.linalg.svd(T.abs())
    torch.testing.assert_close(torch.outer(s.r, s.c), S[0] * torch.outer(U[:, 0], Vh[0]), rtol=1e-6, atol=1e-6)
    assert torch.equal(s.B.double(), torch.where(T >= 0, 1.0, -1.0).double())
    exact = RowColumn(torch.rand(4) + 0.1, torch.rand(6) + 0.1, torch.randint(2, (4, 6)).float() * 2 - 1)
    torch.testing.assert_close(start(exact.dense(), 3).dense(), exact.dense())


def test_a_row_column_weight_is_found_again() -> None:
    g = torch.Generator().manual_seed(0)
    exact = RowColumn(
        torch.rand(8, generator=g) + 0.2,
        torch.rand(12, generator=g) + 0.2,
        torch.randint(2, (8, 12), generator=g).float() * 2 - 1,
    )
    H = problem(1, 12, 0)[1].float()
    torch.testing.assert_close(
        RowColumnSolver().solve(Problem(exact.dense(), H)).dense(), exact.dense(), rtol=1e-3, atol=1e-4
    )


# ---- the whole solver ----------------------------------------------------------------------------------------------


def plain_solve(T: Tensor, H: Tensor, rounds: int, iterations: int) -> RowColumn:
    s = start(T, iterations)
    s = RowColumn(s.r, s.c, s.B.double())
    for _ in range(rounds):
        s = plain_columns(plain_rows(plain_codes(s, T, H), T, H), T, H)
    return plain_rows(s, T, H)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 9), (9, 1), (5, 8), (12, 20)])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_solver_equals_the_plain_version(N: int, K: int, rounds: int) -> None:
    T, H = (t.float() for t in problem(N, K, N + K))
    fast = RowColumnSolver(rounds=rounds).solve(Problem(T, H))
    plain = plain_solve(T.double(), H.double(), rounds, 10)
    assert torch.equal(fast.B.double(), plain.B)
    torch.testing.assert_close(fast.dense().double(), plain.dense(), rtol=1e-3, atol=1e-4)
    assert objective_value(fast, T, H) == pytest.approx(f(plain, T, H), rel=1e-4, abs=1e-8)


def test_no_rounds_give_the_start() -> None:
    T, H = (t.float() for t in problem(4, 6, 0))
    assert torch.equal(RowColumnSolver(rounds=0).solve(Problem(T, H)).dense(), start(T, 10).dense())


def test_objective_value_is_f() -> None:
    (T, H), s = problem(4, 6, 0), random_start(4, 6, 0)
    assert objective_value(s, T, H) == pytest.approx(f(s, T, H), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), T_power=st.integers(-26, 26), H_power=st.integers(-26, 26))
def test_units_do_not_matter(seed: int, T_power: int, H_power: int) -> None:
    """T times 2^p and H times 4^q: W^ times 2^p, bit for bit."""
    T, H = (t.float() for t in problem(6, 10, seed))
    plain = RowColumnSolver().solve(Problem(T, H)).dense()
    assert torch.equal(
        RowColumnSolver().solve(Problem(T * 2.0**T_power, H * 4.0**H_power)).dense(), plain * 2.0**T_power
    )


def difficult(kind: str, N: int, K: int, seed: int, power: int, tail: float) -> tuple[Tensor, Tensor]:
    """Targets with heavy tails, metrics that are nearly singular in different ways."""
    g = torch.Generator().manual_seed(seed)
    if kind == "spectrum":  # eigenvalues from 1 down to 10^-power
        Q, _ = torch.linalg.qr(torch.randn(K, K, generator=g, dtype=torch.float64))
        H = ((Q * 10.0 ** (-power * torch.rand(K, generator=g, dtype=torch.float64))) @ Q.T).float()
    elif kind == "cancelling":  # integers: q H q^T can vanish exactly up to the ridge
        u = torch.randint(-2, 3, (K,), generator=g).float()
        H = torch.outer(u, u) + 10.0**-power * torch.eye(K)
    else:  # three tokens with massive channels
        X = torch.randn(3, K, generator=g) * torch.exp(3 * torch.randn(K, generator=g))
        H = X.T @ X + 10.0**-power * torch.eye(K)
    T = torch.randn(N, K, generator=g) * torch.exp(tail * torch.randn(N, K, generator=g))
    return T if tail else T.sign(), (H + H.T) / 2


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(["spectrum", "cancelling", "few tokens"]),
    N=st.integers(1, 16),
    K=st.integers(1, 16),
    seed=st.integers(0, 10_000),
    power=st.integers(0, 15),
    tail=st.sampled_from([0.0, 0.5, 2.0, 4.0]),
    units=st.tuples(st.integers(-8, 8), st.integers(-8, 8)),
)
def test_no_step_raises_f(
    kind: str, N: int, K: int, seed: int, power: int, tail: float, units: tuple[int, int]
) -> None:
    """Each step, from the start on, lowers f, but for float32 rounding against |T|^2 tr(H)."""
    T, H = difficult(kind, N, K, seed, power, tail)
    T, H = T * 10.0 ** units[0], H * 100.0 ** units[1]
    allowed = 1e-6 * float(T.double().square().sum() * H.double().trace())
    s, TH = start(T, 10), T @ H
    before = f(s, T, H)
    for _ in range(3):
        for step in (update_codes, update_row_scales, update_column_scales):
            s = step(s, TH, H)
            now = f(s, T, H)
            assert now <= before + allowed, step.__name__
            before = now
    assert torch.isfinite(s.dense()).all()
    assert torch.equal(s.B.abs(), torch.ones_like(s.B))


@settings(deadline=None, max_examples=40)
@given(N=st.integers(1, 12), K=st.integers(1, 24), seed=st.integers(0, 10_000))
def test_on_sound_problems_no_step_raises_f_at_all(N: int, K: int, seed: int) -> None:
    T, H = (t.float() for t in problem(N, K, seed))
    s, TH = start(T, 10), T @ H
    before = f(s, T, H)
    zero = f(RowColumn(s.r * 0, s.c, s.B), T, H)
    for _ in range(3):
        for step in (update_codes, update_row_scales, update_column_scales):
            s = step(s, TH, H)
            now = f(s, T, H)
            assert now <= before * (1 + 1e-6) + 1e-6 * zero
            before = now
    assert before < zero


def test_a_row_scale_is_not_the_quotient_of_two_rounding_errors() -> None:
    """Rows along which H vanishes but for rounding: such a scale once came out at ten million."""
    for K, seed in itertools.product((8, 12), range(60)):
        T, H = difficult("cancelling", 16, K, seed, 15, 0.0)
        assert float(RowColumnSolver().solve(Problem(T, H)).dense().norm() / T.norm()) < 2


def test_column_scales_of_a_nearly_singular_system_are_solved_as_in_float64() -> None:
    """A system formed in float32 would have directions of its own, which such a solve goes astray in."""
    moved = 0.0
    for seed in range(30):
        T, H = difficult("spectrum", 1 + seed % 2, 8, seed, 12, 2.0)
        s, TH = start(T, 10), T @ H
        exact = update_column_scales(RowColumn(s.r.double(), s.c.double(), s.B.double()), TH.double(), H.double())
        found = update_column_scales(s, TH, H)
        torch.testing.assert_close(found.c.double(), exact.c, rtol=1e-5, atol=1e-6 * float(exact.c.abs().max()))
        moved += float((found.c != s.c).double().mean())
    assert moved > 15  # and most were solved, not kept


# ---- corner cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused(bad: float, which: int) -> None:
    pair = [t.float() for t in problem(3, 4, 0)]
    pair[which][1, 2] = bad
    with pytest.raises(LitBinqError, match="target or metric holds NaN or inf") as caught:
        RowColumnSolver().solve(Problem(*pair))
    assert "\n" not in str(caught.value)


def test_negative_rounds_are_refused() -> None:
    with pytest.raises(LitBinqError, match=r"solver\.rounds: got -1"):
        RowColumnSolver(rounds=-1)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (1, 5), (5, 1)])
def test_the_zero_matrix_stays_zero(shape: tuple[int, int]) -> None:
    H = problem(1, shape[1], 0)[1].float()
    s = RowColumnSolver().solve(Problem(torch.zeros(shape), H))
    assert float(s.dense().abs().max()) == 0
    assert torch.isfinite(s.r).all()
    assert torch.isfinite(s.c).all()


def test_zero_rows_and_columns() -> None:
    T, H = (t.float() for t in problem(6, 8, 3))
    T[2] = 0
    s = RowColumnSolver().solve(Problem(T, H))
    assert float(s.dense()[2].abs().max()) == 0
    T[:, [0, 5]] = 0
    s = RowColumnSolver().solve(Problem(T, torch.eye(8)))
    assert float(s.dense()[:, [0, 5]].abs().max()) == 0
    assert float(s.dense()[2].abs().max()) == 0
    rest = [1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(s.dense()[:, rest], RowColumnSolver().solve(Problem(T[:, rest], torch.eye(6))).dense())


def test_a_single_weight_is_exact() -> None:
    for value in (3.0, -0.25, 1e-6, -1e6):
        s = RowColumnSolver().solve(Problem(torch.tensor([[value]]), torch.tensor([[0.7]])))
        assert float(s.dense()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (7, 1)])  # a single row or column is its own transpose
def test_inputs_are_left_alone(shape: tuple[int, int]) -> None:
    T, H = (t.float() for t in problem(*shape, 0))
    kept = T.clone(), H.clone()
    s, TH = start(T, 3), T @ H
    s.B.neg_()  # all codes wrong, so that a sweep has something to do
    B = s.B.clone()
    assert not torch.equal(update_codes(s, TH, H).B, B)
    RowColumnSolver().solve(Problem(T, H))
    assert torch.equal(T, kept[0])
    assert torch.equal(H, kept[1])
    assert torch.equal(s.B, B)
