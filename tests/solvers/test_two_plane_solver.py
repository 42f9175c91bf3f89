"""The two-plane solver: every part lowers what it is meant to lower, under the whole metric and with outliers first."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitting import Remember, fit
from lit_binq.calibration.options import BlockTuning, ClosedForm, ModelTuning
from lit_binq.errors import LitBinqError
from lit_binq.formats import InputFormat, TwoPlane, TwoPlaneLinear
from lit_binq.formats.registry import packed_linears
from lit_binq.formats.two_plane.solution import RANK, stored_order, swapped
from lit_binq.hub.save_load import load_packed
from lit_binq.solvers import PlanesSolver, Problem, TwoPlaneSolver, objective_value
from lit_binq.solvers.four_means import by_rank, canonical
from lit_binq.solvers.two_plane import descend_ranks, reordered, update_levels
from problems import f, problem, shapes


def anisotropic(N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Columns of very different size that hang together, float32."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * K, K, generator=g) @ torch.randn(K, K, generator=g) * torch.randn(K, generator=g).exp()
    H = X.T @ X / len(X)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return torch.randn(N, K, generator=g), H


def random_start(N: int, K: int, levels: int, group: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = canonical(torch.randn(N, -(-K // group), levels, generator=g, dtype=torch.float64))
    return p, torch.randint(4, (N, K), generator=g).to(torch.uint8)


def dense(p: Tensor, ranks: Tensor, group: int) -> Tensor:
    return TwoPlane(p[..., RANK] if p.shape[-1] == 4 else p, swapped(ranks), group).dense()


variants = {"levels": st.sampled_from((2, 3, 4)), "group": st.sampled_from((3, 5, 8))}


@settings(deadline=None, max_examples=60)
@given(**shapes, **variants)
def test_no_refinement_raises_the_objective(N: int, K: int, seed: int, levels: int, group: int) -> None:
    """From any levels and ranks; groups need no whole bytes here."""
    T, H = problem(N, K, seed)
    p, ranks = random_start(N, K, levels, group, seed)
    rounding = 1e-11 * f(torch.zeros_like(T), T, H)
    values = [f(dense(p, ranks, group), T, H)]
    for _ in range(4):
        ranks = descend_ranks(p, ranks, T @ H, H, group)
        values.append(f(dense(p, ranks, group), T, H))
        p, ranks = update_levels(p, ranks, T @ H, H, group)
        values.append(f(dense(p, ranks, group), T, H))
        assert all(after <= before + rounding for before, after in itertools.pairwise(values))
        torch.testing.assert_close(p, canonical(p))


@settings(deadline=None, max_examples=30)
@given(**shapes, **variants)
def test_levels_are_the_least_squares_of_their_ranks(N: int, K: int, seed: int, levels: int, group: int) -> None:
    """Against one dense system a row, solved for all features of the row at once."""
    T, H = problem(N, K, seed)
    p, ranks = random_start(N, K, levels, group, seed)
    new, renamed = update_levels(p, ranks, T @ H, H, group)
    root = torch.linalg.cholesky(H).T  # f is the sum of |root (t - w)|^2
    features = by_rank(torch.eye(levels, dtype=torch.float64))[:, ranks.long()]  # (L, N, K)
    best = 0.0
    for i in range(N):
        E = torch.zeros(K, p[0].numel(), dtype=torch.float64)
        for j in range(K):
            E[j, j // group * levels : j // group * levels + levels] = features[:, i, j]
        solved = torch.linalg.lstsq(root @ E, root @ T[i][:, None], driver="gelsd").solution
        best += float((root @ (T[i][:, None] - E @ solved)).square().sum())
    assert f(dense(new, renamed, group), T, H) <= best * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_ranks_end_where_no_single_weight_can_do_better(levels: int) -> None:
    """Brute force over all four levels of every weight."""
    T, H = problem(5, 11, 1)
    p, ranks = random_start(5, 11, levels, 4, 0)
    for _ in range(40):
        ranks = descend_ranks(p, ranks, T @ H, H, 4)
    W = dense(p, ranks, 4)
    value = f(W, T, H)
    four = by_rank(p)
    for i in range(5):
        for j in range(11):
            for level in four[i, j // 4]:
                V = W.clone()
                V[i, j] = level
                assert f(V, T, H) >= value * (1 - 1e-9)


@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (3, 7), (4, 64)])
def test_blocks_do_not_matter(inner: int, outer: int) -> None:
    T, H = problem(16, 37, 0)
    p, ranks = random_start(16, 37, 4, 8, 0)
    one = descend_ranks(p, ranks, T @ H, H, 8)
    assert torch.equal(one, descend_ranks(p, ranks, T @ H, H, 8, inner=inner, outer=outer))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_renaming_keeps_the_weight(levels: int) -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.randn(6, 3, levels, generator=g)
    ranks = torch.randint(4, (6, 20), generator=g).to(torch.uint8)
    new, renamed = reordered(p, ranks, 8)
    assert torch.equal(new, canonical(new))
    torch.testing.assert_close(dense(new, renamed, 8), dense(p, ranks, 8))


@pytest.mark.grid(5)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_every_part_lowers_the_objective(levels: int, seed: int) -> None:
    """Hessian weights beat none, refinement beats both, more of it is never worse."""
    T, H = anisotropic(48, 80, seed)

    def value(**options: object) -> float:
        return objective_value(TwoPlaneSolver(group=40, levels=levels, **options).solve(Problem(T, H)), T, H)

    both = value(refine=0)
    assert both < value(hessian=False, refine=0)
    refined = [value(refine=rounds) for rounds in (1, 2, 4)]
    assert refined[0] < 0.95 * both
    assert refined[0] * (1 + 1e-5) >= refined[1]
    assert refined[1] * (1 + 1e-5) >= refined[2]


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_hessian_weighting_beats_none_in_its_own_metric(levels: int) -> None:
    """With a diagonal metric f is what EM minimises."""
    T, H = anisotropic(32, 64)
    D = torch.diag(H.diagonal())
    values = [
        objective_value(TwoPlaneSolver(levels=levels, group=64, hessian=h, refine=0).solve(Problem(T, D)), T, D)
        for h in (True, False)
    ]
    assert values[0] < 0.9 * values[1]


def test_fewer_numbers_cost_error_and_two_free_planes_beat_row_and_column_scales() -> None:
    T, H = anisotropic(64, 96)
    values = [objective_value(TwoPlaneSolver(group=32, levels=n).solve(Problem(T, H)), T, H) for n in (4, 3, 2)]
    values.append(objective_value(PlanesSolver(shares=[1.0]).solve(Problem(T, H)), T, H))
    assert values == sorted(values)


def test_feedback_is_that_of_one_column_after_the_other() -> None:
    """With one level structure given: a plain loop over columns, the errors spread by H's inverse."""
    T, H = problem(4, 21, 3)
    s = TwoPlaneSolver(group=8, refine=0).solve(Problem(T, H))
    H = H + 0.01 * H.diagonal().mean() * torch.eye(21)  # what the feedback is damped by
    four = s.levels[..., RANK]
    W = T.clone()
    for j in range(21):
        level = four[:, j // 8]
        nearest = level.gather(1, (W[:, j : j + 1] - level).abs().argmin(1, keepdim=True))[:, 0]
        torch.testing.assert_close(s.dense()[:, j], nearest)
        rest = slice(j + 1, 21)
        # The best values of the columns to come, all so far being fixed.
        error = (T - s.dense())[:, : j + 1] @ H[: j + 1, rest]
        if j < 20:
            W[:, rest] = T[:, rest] + torch.linalg.solve(H[rest, rest], error.T).T


@pytest.mark.parametrize("P", [8, 16])
def test_outliers_come_first_in_the_groups(P: int) -> None:
    """The same as solving the problem with its columns in stored order."""
    T, H = anisotropic(24, 40)
    outliers = H.diagonal().topk(P).indices.sort().values
    inputs = InputFormat(4, outliers)
    s = TwoPlaneSolver(group=8).solve(Problem(T, H, inputs=inputs))
    order = stored_order(outliers, 40)
    assert order[:P].tolist() == outliers.tolist()
    other = TwoPlaneSolver(group=8).solve(Problem(T[:, order], H[order][:, order]))
    assert torch.equal(s.stored_dense(), other.dense())
    assert torch.equal(s.dense()[:, order], other.dense())
    assert s.inputs is inputs
    layer = s.pack()
    assert (layer.outliers, layer.activation_bits) == (P, 4)


def test_levels_survive_their_rounding() -> None:
    T, H = anisotropic(32, 56)
    s = TwoPlaneSolver(group=16).solve(Problem(T, H))
    value, rounded = (objective_value(w, T, H) for w in (s, s.pack().solution()))
    assert rounded == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_extremes(levels: int) -> None:
    """Zeros, constant rows, huge values, a metric of rank one, a single column."""
    solver = TwoPlaneSolver(group=8, levels=levels)
    T, H = anisotropic(8, 20)
    T[0], T[1], T[2] = 0.0, 3.0, 1e4 * T[2]
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    singular = x @ x.T + 1e-6 * torch.eye(20)
    for metric in (H, torch.eye(20), singular, 1e-20 * H, 1e20 * H):
        s = solver.solve(Problem(T, metric))
        assert torch.isfinite(s.levels).all()
        assert objective_value(s, T, metric) < 0.5 * float(((T @ metric) * T).sum())
        assert s.dense()[0].abs().max() == 0
        if levels > 2 and metric is not singular:  # there float32 cannot tell what is best
            torch.testing.assert_close(s.dense()[1], T[1], rtol=1e-3, atol=1e-3)
        s.pack()
    one = solver.solve(Problem(T[:, :1], H[:1, :1]))
    torch.testing.assert_close(one.dense(), T[:, :1])
    dead = H.clone()
    dead[:, 3] = dead[3] = 0.0
    dead[3, 3] = 1e-12
    assert torch.isfinite(solver.solve(Problem(T, dead)).dense()).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"group": 12}, r"solver\.group: got 12, expected a multiple of 8"),
        ({"levels": 5}, r"solver\.levels: got 5, expected 4 \(free\)"),
        ({"refine": -1}, r"solver\.refine: got -1"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(LitBinqError, match=words) as caught:
        TwoPlaneSolver(**wrong)
    assert "\n" not in str(caught.value)


def test_wrong_systems_are_refused() -> None:
    T, H = anisotropic(4, 16)
    with pytest.raises(LitBinqError, match="NaN or inf"):
        TwoPlaneSolver().solve(Problem(T * torch.nan, H))
    with pytest.raises(LitBinqError, match="outliers: got 3 of 16"):
        TwoPlaneSolver().solve(Problem(T, H, inputs=InputFormat(4, torch.arange(3))))


@pytest.mark.grid(1)
@pytest.mark.parametrize("options", [{}, {"levels": 3, "group": 8}, {"hessian": False, "refine": 0}])
def test_a_fit_of_a_tiny_model(options: dict[str, object], make_source, text_file, tmp_path) -> None:
    """Solved, tuned block by block and as a whole, packed; what it computes with is what is stored."""
    remember = Remember()
    module = fit(
        make_source("llama", blocks=1),
        text_file,
        tmp_path / "packed",
        callbacks=[remember],
        closed_form=ClosedForm(solver=TwoPlaneSolver(**options)),
        tuning=BlockTuning(epochs=1),
        end_to_end=ModelTuning(epochs=1, lr_codes=0.03),
    )
    assert all(r.after <= r.before for r in module.records)
    model, _ = load_packed(tmp_path / "packed")
    assert {type(m) for m in packed_linears(model).values()} == {TwoPlaneLinear}
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
